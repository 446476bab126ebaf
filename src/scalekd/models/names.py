"""Names of models: those that scalekd adds to timm, and suggestions for one that timm does not know."""

from __future__ import annotations

from scalekd.common.errors import nearest
from scalekd.common.text import printable

MOST = 6  # names in a hint
ADDED = {  # the names that scalekd adds to timm, by the module that does it
    "mlp_mixer": "scalekd.models.mixer",
    "vit_wide_last": "scalekd.models.wide_last",
    "vit_lift": "scalekd.models.wide_last",
    "transformers_vision": "scalekd.models.transformers_vision",
}


def way_to(name: str) -> str:
    """The end of an error about a model name that is no timm name, folder or file: how to fix it."""
    import timm

    scheme, _, path = name.partition(":") if name.startswith(("hf-hub:", "hf_hub:", "local-dir:")) else ("", "", name)
    repository, _, revision = path.partition("@")
    own = repository.rpartition("/")[2]
    if repository == f"timm/{own}" and timm.models.is_model_pretrained(own):
        return f". Its name in timm is `{own}`"
    if scheme == "local-dir":
        return printable(f". Use the folder's path: {path}")
    if scheme:
        at = f" --revision {revision}" * bool(revision)
        download = f"`hf download {repository}{at} --local-dir {own}`"
        return printable(f". Download the model first, {download}, then use its folder, ./{own}")
    folder = ", and there is no such folder" if "/" in name else ""
    return f"{folder}.{models_like(name)}"


def models_like(name: str) -> str:
    """A hint for an unknown model name: the timm names that start with it, or else the nearest ones."""
    import timm

    start, known = name.split(".")[0], timm.list_models()
    begin = [model for model in known if start and model.startswith(start)]
    if not begin:
        return nearest(start, known)
    # those with pre-trained weights first, then the short ones
    begin.sort(key=lambda model: (not timm.models.is_model_pretrained(model), len(model)))
    more = f", ... ({len(begin)} in all)" if len(begin) > MOST else ""
    return f" timm names that start with it: {', '.join(begin[:MOST])}{more}."
