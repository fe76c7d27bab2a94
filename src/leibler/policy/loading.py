"""From a directory or a hub id to a Transformers model and its tokenizer, with one clear sentence when it fails.

Weights are read from safetensors only: a pickle can run code when it is read. Code that comes with a checkpoint is
not run unless asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from leibler.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9_][\w.-]*)?$")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tokenizer_config.json",
)
MASKED = "BERT, ModernBERT or DistilBERT"
"""The masked language models that can be used."""
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def is_local(source: str | Path) -> bool:
    """Whether ``source`` names a place on this machine rather than a repository on the hub.

    Anything that exists is local; so is anything that could not be a hub id (``./x``, ``/x``, ``~/x``, ``a/b/c``).

    Examples:
        >>> is_local("./student"), is_local("Qwen/Qwen2.5-0.5B")
        (True, False)
    """
    return isinstance(source, Path) or Path(source).expanduser().exists() or not _HUB_ID.match(source)


def check_directory(source: str | Path) -> Path:
    """The directory of a checkpoint that can be loaded safely, or a ``ModelError`` that says what is missing."""
    path = Path(source).expanduser()
    if not path.exists():
        raise ModelError(
            f"There is no directory {str(source)!r}; give a checkpoint directory or a hub id such as org/name."
        )
    if not path.is_dir():
        raise ModelError(
            f"{str(source)!r} is a file; give the directory that holds config.json, weights and tokenizer."
        )
    if not (path / "config.json").is_file():
        if (path / "adapter_config.json").is_file():
            raise ModelError(f"{str(source)!r} holds an adapter only; give the merged checkpoint, or its base model.")
        raise ModelError(f"{str(source)!r} is not a checkpoint: it has no config.json; save one with save_pretrained.")
    if not any(path.glob("*.safetensors")):
        pickles = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
        if pickles:
            raise ModelError(
                f"{str(source)!r} holds pickled weights only ({pickles[0]}), which can run code when read; "
                "convert them with save_pretrained(..., safe_serialization=True)."
            )
        raise ModelError(f"{str(source)!r} has a config.json but no weights; expected model.safetensors.")
    if (path / "adapter_config.json").is_file():  # Transformers would load it too, from wherever it says
        raise ModelError(
            f"{str(source)!r} holds an adapter beside the weights; merge it with merge_and_unload() and save the "
            "result, or move adapter_config.json away."
        )
    _check_index(path)
    if not any((path / name).is_file() for name in _TOKENIZER_FILES):
        raise ModelError(f"{str(source)!r} has no tokenizer; save one there with tokenizer.save_pretrained.")
    return path


def _check_index(path: Path) -> None:
    """The shards that an index names must be safetensors files beside it: an index may name a pickle, or any path."""
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        return
    try:
        shards = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise ModelError(f"{str(index)!r} is not an index of weights; copy or convert the checkpoint again.") from error
    for shard in shards:
        if not isinstance(shard, str) or not shard.endswith(".safetensors") or Path(shard).name != shard:
            raise ModelError(
                f"model.safetensors.index.json names the shard {str(shard)[:80]!r}; only safetensors files in "
                f"{str(path)!r} are read, so convert the checkpoint again."
            )


def check_hub(source: str) -> bool:
    """Whether the hub can be asked for ``source``; False without a network, when only a cached copy can serve.

    Raises:
        ModelError: the hub answers that the repository does not exist, is not open to us or has pickled weights only.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        # Asked first because from_pretrained goes on trying for most of a minute when there is no network.
        files = [entry.rfilename for entry in HfApi().model_info(source, timeout=20).siblings or ()]
    except GatedRepoError as error:
        raise ModelError(
            f"The hub repository {source!r} is gated; accept its terms there and run `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"There is no directory and no public hub repository {source!r}; check the spelling."
        ) from error
    except HfHubHTTPError as error:
        raise ModelError(f"The hub refused {source!r}: {first_line(error)}.") from error
    except Exception as error:  # the transport's own errors: which they are depends on the HTTP library in use
        if (
            isinstance(error, (OSError, TimeoutError))
            or "Connect" in type(error).__name__
            or "Timeout" in type(error).__name__
        ):
            return False
        raise ModelError(f"The hub could not be asked for {source!r}: {first_line(error)}.") from error
    if not any(name.endswith(".safetensors") for name in files):
        raise ModelError(
            f"The hub repository {source!r} has no safetensors weights; convert it first, pickles are not read."
        )
    return True


def first_line(error: BaseException) -> str:
    text = str(error).strip()
    return (text.splitlines()[0] if text else type(error).__name__).rstrip(". ")[:300]


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars of Transformers inside the block; the setting is put back."""
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if before:
            logging.enable_progress_bar()


def masked_architecture(source: str | Path) -> str | None:
    """The architecture that a checkpoint's configuration names, if it is one that fills in masked positions.

    Raises:
        ModelError: there is no checkpoint that can be loaded safely.
    """
    return _masked_architecture(source, *_place(source))


def _masked_architecture(source: str | Path, place: str, offline: bool) -> str | None:
    from transformers import PreTrainedConfig

    try:
        config, _ = PreTrainedConfig.get_config_dict(place, local_files_only=offline)
    except Exception as error:  # it raises what it likes; the user needs the sentence, we keep the cause
        raise _explained(source, "configuration", error, {"local_files_only": offline}) from error
    named = config.get("architectures")
    found = [str(name) for name in named if str(name).endswith("ForMaskedLM")] if isinstance(named, list) else []
    return found[0] if found else None


def _place(source: str | Path) -> tuple[str, bool]:
    """Where Transformers looks for a checkpoint, and whether it must do without the network."""
    if is_local(source):
        return str(check_directory(source)), True
    return str(source), not check_hub(str(source))


def load_pretrained(
    source: str | Path, *, dtype: torch.dtype, trust_remote_code: bool, masked: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of ``source``; every failure is a ``ModelError`` of one sentence.

    Args:
        source: a directory or a hub id.
        dtype: of the weights.
        trust_remote_code: run Python code that comes with the checkpoint.
        masked: a model that fills in masked positions is wanted, not one that reads from left to right.
    """
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

    place, offline = _place(source)
    kind = _masked_architecture(source, place, offline)
    if masked and kind is None:
        raise ModelError(f"{str(source)!r} is no masked language model; give a checkpoint saved from one ({MASKED}).")
    if kind is not None and not masked:
        raise ModelError(
            f"{str(source)!r} is a masked language model ({kind}), which fills in positions and does not read from "
            "left to right; give a decoder-only checkpoint here."
        )
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": offline}
    family: Any = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(place, **options)
    except (
        Exception
    ) as error:  # each tokenizer class raises what it likes; the user needs the sentence, we keep the cause
        raise _explained(source, "tokenizer", error, options) from error
    try:
        with quiet():
            loaded: Any = family.from_pretrained(
                place, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
            )
            model, report = loaded
    except Exception as error:
        raise _explained(source, "model", error, options) from error
    missing = sorted(report.get("missing_keys") or ())
    if missing:  # Transformers would go on with random weights
        raise ModelError(
            f"The weights in {str(source)!r} are incomplete: {len(missing)} tensors such as {missing[0]!r} "
            "are missing; copy or convert the checkpoint again."
        )
    return model, tokenizer


def _explained(source: str | Path, what: str, error: Exception, options: dict[str, Any]) -> ModelError:
    text = str(error)
    if "trust_remote_code" in text:
        return ModelError(f"{str(source)!r} brings code of its own; pass trust_remote_code=True if you trust it.")
    if not is_local(source) and options["local_files_only"]:
        return ModelError(
            f"There is no directory {str(source)!r} and the hub cannot be reached (nor is a copy cached); "
            "check the path or the network."
        )
    if "Unrecognized configuration class" in text:
        return ModelError(f"{str(source)!r} is not a causal language model; Leibler trains decoder-only checkpoints.")
    return ModelError(f"The {what} in {str(source)!r} cannot be loaded: {first_line(error)}.")
