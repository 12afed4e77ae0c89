"""Models and tokenizers of the commands: where they are, found out before anything is loaded, and how to try one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

from . import CommandError

__all__ = ["lines_to_try", "load", "locate"]

HUB_SECONDS = 10.0
"""How long the hub may take to say whether it has a model."""


def locate(role: str, name: str) -> str:
    """Find a model: a folder, the hub, or the hub's cache on this machine.

    The hub is asked once. transformers would ask it for each file, and each time again for half a minute where there
    is no network.

    Returns:
        What `from_pretrained` takes: the name, or the model's folder in the cache where the hub does not answer.

    Raises:
        CommandError: it is in none of these places, or its terms have not been accepted.
    """
    if Path(name).is_dir():
        return name
    # "owner/name" may be on the hub. A name that looks like a path is a folder and nothing else.
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise CommandError(f"{role} {name}: no such folder")
    try:
        HfApi().model_info(name, timeout=HUB_SECONDS)
    except GatedRepoError:
        raise CommandError(
            f"{role} {name}: the hub gives it to those who accepted its terms: accept them at "
            f"https://huggingface.co/{name} and log in with 'hf auth login'"
        ) from None
    except HFValidationError as error:
        raise CommandError(f"{role} {name}: no such folder, and no name of the hub: {error}") from None
    except RepositoryNotFoundError:
        raise CommandError(
            f"{role} {name}: no such folder, and no such model on the hub (a private one needs 'hf auth login')"
        ) from None
    except Exception as error:  # no network, a proxy, a hub that is down, HF_HUB_OFFLINE
        cached = try_to_load_from_cache(name, "config.json")
        if isinstance(cached, str):
            return str(Path(cached).parent)
        if isinstance(error, HfHubHTTPError) and error.response is not None:
            reason = f"the hub answers {error.response.status_code}"
        else:
            reason = f"the hub cannot be reached ({error})"
        raise CommandError(
            f"{role} {name}: no such folder, not in the hub's cache on this machine, and {reason}"
        ) from None
    return name


def load(role: str, name: str, from_pretrained: Callable[..., Any], **options: Any) -> Any:
    """What `from_pretrained` makes of a folder or hub name.

    Raises:
        CommandError: whatever goes wrong, with the name in front.
    """
    try:
        return from_pretrained(name, **options)
    except Exception as error:
        raise CommandError(f"{role} {name}: cannot be loaded: {type(error).__name__}: {error}") from error


def lines_to_try(folder: str, tokenizer: Any) -> str:
    """Two lines of Python that load the model in `folder` and let it answer, in the format that it was trained on."""
    question = "Name a word that rhymes with cat."
    if getattr(tokenizer, "chat_template", None):
        asked, answer = repr([{"role": "user", "content": question}]), '[0]["generated_text"][-1]["content"]'
    else:
        asked, answer = repr(f"### User:\n{question}\n\n### Assistant:\n"), '[0]["generated_text"]'
    return (
        f'from transformers import pipeline; ask = pipeline("text-generation", model={folder!r})\n'
        f"print(ask({asked}, max_new_tokens=60, do_sample=False){answer})\n"
    )
