"""Suggestions for a model name that timm does not know."""

from __future__ import annotations

from scalekd.common.errors import nearest
from scalekd.common.text import printable


def way_to(name: str) -> str:
    """What to tell of a model's name that is none of timm's, no folder and no file."""
    import timm

    scheme, _, place = name.partition(":") if name.startswith(("hf-hub:", "hf_hub:", "local-dir:")) else ("", "", name)
    repository, _, revision = place.partition("@")
    own = repository.rpartition("/")[2]
    if repository == f"timm/{own}" and timm.models.is_model_pretrained(own):
        return f". Its name in timm is `{own}`"
    if scheme == "local-dir":
        return printable(f". Name the folder itself: {place}")
    if scheme:
        at = f" --revision {revision}" * bool(revision)
        download = f"`hf download {repository}{at} --local-dir {own}`"
        return printable(f". A model of the hub is taken from a folder: {download}, then name it, ./{own}")
    folder = ", and there is no such folder" if "/" in name else ""
    return f"{folder}.{nearest(name.split('.')[0], timm.list_models())}"
