"""`adakd eval`: how good a model's own answers are, and how far it is from its teacher."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from . import CommandError, CommandParser, is_disk_full

try:
    import rouge_score  # noqa: F401

    from ..evaluation.evaluate import FOUND, EvaluationError, Settings, check_settings, evaluate
    from ..evaluation.intervals import BOOTSTRAP
    from ..evaluation.prompts import Prompt, load_prompts, set_names
    from ..evaluation.tables import SHOWN, fixed, markdown
    from .options import DTYPES, HelpFormatter
except ImportError as error:
    raise CommandError(f"an evaluation needs more packages: pip install 'adakd-kernels[eval]' ({error})") from error

import torch
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from ..trainer.adapters import base_of_adapter, load_student
from ..trainer.loading import progress_bars
from ..trainer.models import check_causal, position_limit, vocabulary_size
from ..trainer.records import DataError, check_same_tokenizer
from .models import load, locate

__all__ = ["run"]


def run(argv: list[str]) -> int:
    """Evaluate a model, print a table, and leave the numbers and answers in `output_dir`.

    Raises:
        CommandError: options, data or models that cannot be used, a measure that is not finite, or what the machine
            refuses.
    """
    options = _parse(argv)
    settings = _settings(options)
    with ExitStack() as stack:
        folder = options.output_dir or stack.enter_context(TemporaryDirectory())
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            results = _evaluate(options, settings, Path(folder))
        except KeyboardInterrupt:
            goes_on = f"the same command goes on from {folder}" if options.output_dir else "nothing was kept"
            print(f"\nadakd eval: interrupted; {goes_on}", file=sys.stderr)
            return 130
        except FloatingPointError as error:
            raise CommandError(str(error), exit_code=1) from error
        except torch.OutOfMemoryError as error:
            raise CommandError("the device has no memory left: lower batch_size or max_length") from error
        except OSError as error:
            if is_disk_full(error):
                raise
            raise CommandError(f"output_dir {folder}: cannot be written to: {error}") from error
        except (EvaluationError, DataError) as error:
            raise CommandError(str(error)) from error
    print(table(results))
    if options.output_dir:
        print(f"adakd eval: numbers and answers are in {folder}", file=sys.stderr)
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = CommandParser(
        prog="adakd eval",
        allow_abbrev=False,
        formatter_class=HelpFormatter,
        description="Let a model answer the prompts of files and score the answers with ROUGE-L; with a teacher, also "
        "measure how far the model is from it on the references. Dashes may stand for underscores.",
    )
    defaults = Settings()
    add = parser.add_argument
    add("--model", required=True, metavar="NAME", help="folder or hub name of the model, or of an adapter")
    add("--teacher", metavar="NAME", help="folder or hub name of its teacher, to measure the distance from")
    add(
        "--data",
        required=True,
        nargs="+",
        metavar="FILE",
        help="records with prompts and references, a set each; NAME=FILE gives a set another name than the file's",
    )
    of_seeds = " ".join(map(str, defaults.seeds))
    add("--seeds", type=int, nargs="+", help=f"an answer is sampled for each; left out, {of_seeds}")
    add("--greedy", action="store_true", help="take the most likely token each time instead of sampling")
    add("--temperature", type=float, default=defaults.temperature, help="of the sampling")
    add("--top_p", type=float, default=defaults.top_p, help="sample from the likeliest tokens of this mass")
    add("--max_new_tokens", type=int, default=defaults.max_new_tokens, help="tokens of an answer at most")
    add(
        "--max_length",
        type=int,
        help=f"tokens of a prompt with its answer at most; left out, {defaults.max_length} or what the models take",
    )
    add("--max_records", type=int, metavar="N", help="the first records of each set only; left out, all")
    add("--batch_size", type=int, default=defaults.batch_size, help="prompts answered together")
    add("--dtype", default="auto", choices=DTYPES, help="type of the weights of both models; auto: as saved")
    add("--use_cpu", action="store_true", help="leave an accelerator alone")
    add("--attn_implementation", metavar="NAME", help="attention of both models, such as sdpa or flash_attention_2")
    add("--trust_remote_code", action="store_true", help="run the code that comes with a model")
    add("--output_dir", metavar="FOLDER", help="folder for results.json, results.csv and the answers; an evaluation "
        "that was stopped goes on there")  # fmt: skip
    return parser.parse_args([_with_underscores(flag) for flag in argv])


def _with_underscores(flag: str) -> str:
    if not flag.startswith("--"):
        return flag
    name, equals, value = flag[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def _settings(options: argparse.Namespace) -> Settings:
    """The settings of the options; the length is not known yet where it is left out."""
    names = ("greedy", "temperature", "top_p", "max_new_tokens", "batch_size")
    given = {name: getattr(options, name) for name in names}
    length = max(Settings.max_length, options.max_new_tokens + 1) if options.max_length is None else options.max_length
    seeds: dict[str, Any] = {} if options.seeds is None else {"seeds": tuple(options.seeds)}
    settings = Settings(max_length=length, **seeds, **given)
    of_sampling = ("seeds", "temperature", "top_p")
    useless = [name for name in of_sampling if settings.greedy and getattr(settings, name) != getattr(Settings, name)]
    try:
        if useless:
            raise EvaluationError(f"{useless[0]} says how to sample, and greedy not to sample: give one of the two")
        check_settings(settings)
        if options.max_records is not None and options.max_records < 1:
            raise EvaluationError(f"max_records must be 1 or more, got {options.max_records}")
    except EvaluationError as error:
        raise CommandError(str(error)) from None
    return settings


def _evaluate(options: argparse.Namespace, settings: Settings, folder: Path) -> dict[str, Any]:
    """Tokenizers and records come first, because loading the models takes longest."""
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    names = {role: locate(role, name) for role in ("model", "teacher") if (name := getattr(options, role))}
    hub: dict[str, Any] = {"trust_remote_code": options.trust_remote_code}
    tokenizers = {role: load(role, name, AutoTokenizer.from_pretrained, **hub) for role, name in names.items()}
    tokenizer = tokenizers["model"]
    check_same_tokenizer(tokenizer, tokenizers.get("teacher", tokenizer))
    try:
        paths = set_names(options.data)
    except ValueError as error:
        raise CommandError(f"data: {error}") from None
    with progress_bars(False):
        sets = {name: load_prompts(path, tokenizer, options.max_records) for name, path in paths.items()}
    models = {role: _load(role, name, options, hub) for role, name in names.items()}
    settings = _within(models, settings, given=options.max_length)
    _check_vocabulary(models, sets)
    device = next(iter(models.values())).device
    about: dict[str, Any] = {"device": device.type}
    for role, model in models.items():
        about.update({role: getattr(options, role), f"{role}_dtype": str(model.dtype).removeprefix("torch.")})
    return evaluate(
        models["model"], tokenizer, sets, settings, folder=folder, teacher=models.get("teacher"), about=about
    )


def _load(role: str, name: str, options: argparse.Namespace, hub: Mapping[str, Any]) -> Any:
    """A model in evaluation mode, on the accelerator where there is one."""
    # From peft's own call, for every adapter.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    base = base_of_adapter(name)
    model = load(
        role, name, load_student, base=base if base is None else locate(role, base), dtype=options.dtype,
        attn_implementation=options.attn_implementation, **hub,
    )  # fmt: skip
    device = None if options.use_cpu else torch.accelerator.current_accelerator(check_available=True)
    model = model.to(device or "cpu").requires_grad_(False).eval()
    try:
        check_causal(role, model)
    except ValueError as error:
        raise CommandError(str(error)) from None
    return model


def _within(models: Mapping[str, Any], settings: Settings, given: int | None) -> Settings:
    """The settings with a length that both models take."""
    for role, model in models.items():
        limit = position_limit(model)
        if limit is None or limit >= settings.max_length:
            continue
        if given is not None:
            raise CommandError(f"max_length must be {limit} or less, which is all that the {role} takes, got {given}")
        settings = Settings(**{**vars(settings), "max_length": limit})
    check_settings(settings)
    return settings


def _check_vocabulary(models: Mapping[str, Any], sets: Mapping[str, list[Prompt]]) -> None:
    """Refuse ids that a model has no embedding for."""
    largest = max(max(ids) for prompts in sets.values() for prompt in prompts for ids, _ in prompt.sequences)
    for role, model in models.items():
        size = vocabulary_size(model)
        if size is not None and largest >= size:
            raise CommandError(f"data has token id {largest}, but the {role} takes {size} ids: is this its tokenizer?")


def table(results: Mapping[str, Any]) -> str:
    """The means of every set with their intervals, and what they are."""
    sets: dict[str, Any] = {name: part for name, part in results["sets"].items() if FOUND[0] in part}
    rows = [
        [str(SHOWN[measure]), *(_cell(measure, part[measure]) for part in sets.values())]
        for measure in FOUND
        if any(part[measure] for part in sets.values())
    ]
    settings = results["settings"]
    level, draws = f"{BOOTSTRAP['level']:.0%}", BOOTSTRAP["draws"]
    lines = [markdown([settings.get("model", "")[-40:], *sets], rows), ""]
    for name, part in sets.items():
        seeds = (part["rouge_l"] or {}).get("seeds", {})
        what = [f"{part['records']} records", f"{part['answered']} answered"]
        what += ["greedily" if settings["greedy"] else f"for each of the seeds {' '.join(seeds)}"] if seeds else []
        what += [f"{part['tokens']} tokens of references"] if part.get("tokens") else []
        if part["too_long"]:
            what.append(f"{part['too_long']} prompts too long for max_length={settings['max_length']}")
        lines.append(f"{name}: {', '.join(what)}")
    several = any((part["rouge_l"] or {}).get("std") is not None for part in sets.values())
    sampled = "" if not several else "± standard deviation over the seeds; "
    lines.append(f"{sampled}[{level} interval of a bootstrap over the prompts, {draws} draws]")
    return "\n".join(lines)


def _cell(measure: str, found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "–"
    digits = SHOWN[measure].digits
    text = fixed(found["mean"], digits)
    if found.get("std") is not None:
        text += f" ± {fixed(found['std'], digits)}"
    if found["low"] is not None:
        text += f" [{fixed(found['low'], digits)}, {fixed(found['high'], digits)}]"
    return text
