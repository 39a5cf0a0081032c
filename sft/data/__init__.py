"""From files to tokenized rows: reading, templates, tokenizers, the cache on disk, held-out rows, the audit."""
