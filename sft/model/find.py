"""Say at once why a name gives no model: no such folder here, no such repository on the hub."""

import difflib
from pathlib import Path

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError


def not_found(name: str, cache_dir: str | None = None, file: str = "config.json") -> str | None:
    """Why neither a folder nor the hub nor its cache has the model; None when one may have it.

    The hub is asked once: its client would try again for half a minute (huggingface-hub 1.x).

    Args:
        file: a file of the model that its folder in the cache would hold.
    """
    folder = Path(name)
    if folder.exists():
        return None
    others = [path.name for path in folder.parent.iterdir() if path.is_dir()] if folder.parent.is_dir() else []
    near = difflib.get_close_matches(folder.name, others, n=1, cutoff=0.8)
    missing = f"{name}: no such folder" + (f" (did you mean {folder.parent / near[0]}?)" if near else "")
    if name.startswith((".", "/", "~")):
        return f"{missing}."
    try:
        if not isinstance(try_to_load_from_cache(name, file, cache_dir=cache_dir), str):
            HfApi().model_info(name, timeout=10)
        return None
    except HFValidationError:
        return f"{missing}."
    except RepositoryNotFoundError:
        return f"{missing}, and no such repository on the hub. Correct the name; a private one needs: hf auth login"
    except Exception as error:  # of whichever HTTP library the hub's client uses
        why = str(error).strip().splitlines()[0] if str(error).strip() else ""
        return f"{missing}, and the hub does not answer ({type(error).__name__}: {why}). Give a folder that holds the model."
