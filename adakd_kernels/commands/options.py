"""The options of `adakd train`: from a YAML file and flags, in groups, checked before anything is loaded."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import string_to_bool

from ..integrations.transformers import AdaKDConfig
from ..trainer.adapters import is_adapter_folder
from ..trainer.config import DATA_OPTIONS
from ..trainer.methods import METHODS, WITHOUT_ADAKD, Method
from . import CommandError, CommandParser, did_you_mean

__all__ = ["HelpFormatter", "RunOptions", "method_options", "parse", "same_model"]

GENERATIONS = ("transformers", "vllm")
DTYPES = ("auto", "float32", "bfloat16", "float16")
USUAL = (
    "output_dir", "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps",
    "learning_rate", "warmup_steps", "bf16", "logging_steps", "save_steps",
    "save_total_limit", "resume_from_checkpoint", "report_to", "seed", "use_cpu",
)  # fmt: skip
"""Options of the transformers Trainer that `--help` shows; `--help-all` shows all of them."""
ADAPTERS = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "merge_adapter", "load_in_4bit",
            "load_in_8bit")  # fmt: skip
"""Options of `RunOptions` that need an adapter."""
CHOICE = ("method", "adakd", "generation")
"""Options of `RunOptions` that choose a method."""
RECORDING = ("token_records",)
"""Options of `AdaKDConfig` that say what is kept for `adakd report`; they change nothing of the training."""
DIVERGENCE = ("divergence", "divergence_kwargs", "beta")
"""Options that together say which divergence: a given one takes the place of all that a method sets."""


@dataclass
class RunOptions:
    """Method, models and data of a run."""

    method: str | None = field(
        default=None,
        metadata={
            "help": f"Sets what is not given as a published method has it: {', '.join(METHODS)} (docs/methods.md)."
        },
    )
    # `parse` sets this default: true without a method.
    adakd: bool = field(
        default=False,
        metadata={
            "help": "Whether the hardest tokens are selected and each has a temperature of its own; left out, it is "
            "true without a method and false with one."
        },
    )
    generation: str = field(
        default="transformers",
        metadata={"help": f"What samples the completions of a method that needs them: {', '.join(GENERATIONS)}."},
    )

    student: str | None = field(
        default=None,
        metadata={"help": "Folder or hub name of the model, or of the adapter, to train. Required."},
    )
    teacher: str | None = field(
        default=None,
        metadata={"help": "Folder or hub name of the teacher. Required, unless an adapter is trained: where it is left "
                  "out, or is the model under the adapter, that model teaches, from one copy of the weights."},
    )  # fmt: skip
    train_file: str | None = field(
        default=None,
        metadata={
            "help": "Records to train on: JSON lines, JSON, Parquet, CSV, or a folder of save_to_disk, with messages, "
            "conversations, prompt and completion, instruction and output, text, or token ids. Required."
        },
    )
    eval_file: str | None = field(default=None, metadata={"help": "Records to evaluate on, likewise."})
    student_dtype: str = field(
        default="float32",
        metadata={"help": f"Type of the student's weights: {', '.join(DTYPES)}; auto: as saved."},
    )
    teacher_dtype: str = field(default="auto", metadata={"help": "Type of the teacher's weights, likewise."})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention of both models, such as sdpa or flash_attention_2."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the code that comes with a model."})
    lora_r: int | None = field(
        default=None, metadata={"help": "Train an adapter (LoRA) of this rank alone; left out, all weights."}
    )
    lora_alpha: int | None = field(
        default=None, metadata={"help": "What the adapter adds is scaled by lora_alpha / lora_r; left out, by 2."}
    )
    lora_dropout: float | None = field(
        default=None, metadata={"help": "Dropout in front of the adapter; left out, 0.05."}
    )
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Names of the layers that get an adapter, such as q_proj v_proj; left out, all-linear: all "
                  "linear layers but the head."},
    )  # fmt: skip
    merge_adapter: bool = field(
        default=False, metadata={"help": "Merge the adapter at the end, so that output_dir holds a plain model."}
    )
    load_in_4bit: bool = field(
        default=False, metadata={"help": "Keep the model under the adapter in 4 bits (nf4); needs bitsandbytes."}
    )
    load_in_8bit: bool = field(default=False, metadata={"help": "The same in 8 bits."})

    def __post_init__(self) -> None:
        if self.generation not in GENERATIONS:
            raise ValueError(f"generation must be one of {', '.join(GENERATIONS)}, got {self.generation!r}")
        if self.generation == "vllm" and not self.on_policy:
            raise ValueError(f"generation vllm needs a method that samples: {_listed_methods(on_policy=True)}")
        # Whether a name of the hub is an adapter is found out later.
        adapted = self.lora_r is not None or (bool(self.student) and is_adapter_folder(str(self.student)))
        for name in ("student", "train_file") if adapted else ("student", "teacher", "train_file"):
            if not getattr(self, name):
                raise ValueError(f"{name} is missing: give --{name}, or {name} in the --config file")
        if not adapted and same_model(self.student, self.teacher):
            raise ValueError(
                f"student and teacher are the same model, {self.student}: a student learns nothing from itself; "
                "give another student or teacher, or train an adapter with --lora_r"
            )
        self._check_adapter()
        if self.lora_r is not None:
            self.lora_alpha = 2 * self.lora_r if self.lora_alpha is None else self.lora_alpha
            self.lora_dropout = 0.05 if self.lora_dropout is None else self.lora_dropout
            self.lora_target_modules = self.lora_target_modules or ["all-linear"]
        for name in ("student_dtype", "teacher_dtype"):
            if getattr(self, name) not in DTYPES:
                raise ValueError(f"{name} must be one of {', '.join(DTYPES)}, got {getattr(self, name)!r}")

    @property
    def on_policy(self) -> bool:
        """Whether the student samples completions."""
        return self.method is not None and METHODS[self.method].on_policy

    def _check_adapter(self) -> None:
        """Refuse options of an adapter that have no effect or do not go together."""
        given = [name for name in ADAPTERS[1:4] if getattr(self, name) is not None]
        if given and self.lora_r is None:
            raise ValueError(f"{given[0]} needs lora_r: without it no new adapter is made")
        if self.lora_r is not None and self.lora_r < 1:
            raise ValueError(f"lora_r must be 1 or more, got {self.lora_r}")
        if self.lora_alpha is not None and self.lora_alpha < 1:
            raise ValueError(f"lora_alpha must be 1 or more, got {self.lora_alpha}")
        if self.lora_dropout is not None and not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"lora_dropout must be in [0, 1), got {self.lora_dropout}")
        bits = [name for name in ADAPTERS[5:] if getattr(self, name)]
        if len(bits) == 2:
            raise ValueError("load_in_4bit and load_in_8bit exclude each other: give one")
        if bits and self.merge_adapter:
            raise ValueError(
                f"merge_adapter does not go with {bits[0]}: the merged weights would be rounded; merge the adapter "
                "afterwards into the model in full precision"
            )


def same_model(one: str | None, other: str | None) -> bool:
    """Whether two folders or names of the hub are the same."""
    return bool(one) and bool(other) and Path(str(one)).resolve() == Path(str(other)).resolve()


def _listed_methods(on_policy: bool) -> str:
    return ", ".join(name for name, method in METHODS.items() if method.on_policy is on_policy)


def method_options(config: type[Any] = AdaKDConfig) -> list[str]:
    """Names of the options of training that this package adds to those of transformers or TRL, without the data's."""
    ours = [
        vars(cls).get("__annotations__", {}) for cls in config.__mro__ if cls.__module__.startswith("adakd_kernels")
    ]
    others = {option.name for option in fields(TrainingArguments)}.union(DATA_OPTIONS, RECORDING)
    return [
        option.name
        for option in fields(config)
        if option.init and option.name not in others and any(option.name in names for names in ours)
    ]


def _option_names(config: type[Any]) -> set[str]:
    """Names of the options of a run."""
    return {option.name for cls in (RunOptions, config) for option in fields(cls) if option.init}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows one spelling of a flag, and no default where there is none."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        flags = action.option_strings
        action.option_strings = [flag for flag in flags if "-" not in flag.removeprefix("--")] or flags
        try:
            return super()._format_action_invocation(action)
        finally:
            action.option_strings = flags

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class _Parser(CommandParser, HfArgumentParser):
    """Options from the fields of dataclasses, the method's first in the help."""

    def __init__(self, config: type[Any], show_all: bool) -> None:
        self.show_all = show_all
        method, run = {*method_options(config), *CHOICE}, {option.name for option in fields(RunOptions)}
        training = {option.name for option in fields(TrainingArguments)}.union(RECORDING)
        self.names = {
            "method": method, "run": run.difference(ADAPTERS, CHOICE), "adapters": set(ADAPTERS),
            "data": set(DATA_OPTIONS), "sampling": _option_names(config) - training - method - run - set(DATA_OPTIONS),
        }  # fmt: skip
        super().__init__(
            (RunOptions, config),  # type: ignore[arg-type]
            prog="adakd train",
            allow_abbrev=False,
            add_help=False,
            usage="adakd train [--config run.yaml] [--OPTION VALUE ...]",
            description="Distil a teacher into a student. Options may stand in the YAML file; flags override it. "
            "Dashes may stand for underscores.",
            formatter_class=HelpFormatter,
        )
        self.add_argument("--config", help="YAML file of options, named as the flags are, without the dashes.")
        self.add_argument("--help", "-h", action="help", help="Show this and exit.")
        self.add_argument("--help-all", action="help", help="Show every option of the transformers Trainer too.")

    @cached_property
    def groups(self) -> dict[str, Any]:
        """The groups of options in the order of the help."""
        method = self.add_argument_group("the method (docs/maths.md has the equations)")
        run = self.add_argument_group("models and data")
        adapters = self.add_argument_group("adapters (need peft)")
        data = self.add_argument_group("records and batches")
        sampling = self.add_argument_group("sampling of completions (TRL)") if self.names["sampling"] else None
        training = self.add_argument_group(
            "training",
            None if self.show_all else "The transformers Trainer has many more options: --help-all lists them.",
        )
        last = self.add_argument_group("help")
        return {
            "method": method, "run": run, "adapters": adapters, "data": data, "sampling": sampling,
            "training": training, "help": last,
        }  # fmt: skip

    def add_argument(self, *flags: Any, **options: Any) -> argparse.Action:
        """As `ArgumentParser.add_argument`, in the group of the option."""
        name = options.get("dest") or flags[0].lstrip("-")
        if name in ("config", "help", "help-all"):
            group = "run" if name == "config" else "help"
        else:
            group = next((group for group, names in self.names.items() if name in names), "training")
            if "choices" not in options and "action" not in options:
                options["metavar"] = "VALUE"
            if group == "training" and name not in USUAL and not self.show_all:
                options["help"] = argparse.SUPPRESS
        action: argparse.Action = self.groups[group].add_argument(*flags, **options)
        return action


def parse(argv: list[str]) -> tuple[RunOptions, Any]:
    """Options from `--config FILE` and flags; a flag overrides the file, and both what a method sets.

    Returns:
        The options of the run, and an `AdaKDConfig` or, for a method whose student samples, an `OnPolicyConfig`.

    Raises:
        CommandError: an unknown option or method, a value that does not fit, or what a method needs and is not here.
    """
    path = _given(argv).config
    content = {} if path is None else _content(Path(path))
    name = _given(argv).method or content.get("method")
    config_class = _config_class(name)
    parser = _Parser(config_class, show_all="--help-all" in argv)
    from_file = _config_flags(Path(path), content, config_class) if path is not None else []
    try:
        parser.set_defaults(**_preset(name, _given(from_file + argv)))
        parser.parse_known_args(from_file)
    except CommandError as error:  # the flags have come through `_given`, so what it refuses is in the file
        raise CommandError(f"{path}: {error}") from None
    try:
        options, config, _, unknown = parser.parse_args_into_dataclasses(
            from_file + argv, return_remaining_strings=True, look_for_args_file=False
        )
    except (ValueError, TypeError, ImportError) as error:
        raise CommandError(str(error)) from error
    except RecursionError:
        raise CommandError("the JSON of an option is nested too deeply") from None
    if unknown:
        raise CommandError(_unknown(unknown[0], config_class, "--"))
    if options.on_policy:
        config.trust_remote_code = options.trust_remote_code
    if options.generation == "vllm":
        from .on_policy import check_vllm

        check_vllm()
        config.use_vllm = True
    return options, config


def _given(flags: list[str]) -> argparse.Namespace:
    """What flags say about which options there are and what their defaults are; None where they do not."""
    parser = CommandParser(add_help=False, allow_abbrev=False)
    for name in ("config", "method", "divergence", "beta"):
        parser.add_argument(f"--{name}", nargs="?")  # one without a value is the real parser's error
    parser.add_argument("--adakd", nargs="?", type=string_to_bool, const=True)
    return parser.parse_known_args(flags)[0]


def _config_class(method: Any) -> type[Any]:
    """The class of the options of a method, or of a run without one.

    Raises:
        CommandError: there is no such method, or it needs trl.
    """
    if method is None:
        return AdaKDConfig
    if not isinstance(method, str) or method not in METHODS:
        raise CommandError(
            f"unknown method {method!r}; expected one of {', '.join(METHODS)}{did_you_mean(str(method), METHODS)}"
        )
    if not METHODS[method].on_policy:
        return AdaKDConfig
    try:
        from .on_policy import OnPolicyConfig
    except ImportError as error:
        raise CommandError(f"method {method}: the student samples completions, and {error}") from error
    return OnPolicyConfig


def _preset(name: str | None, given: argparse.Namespace) -> dict[str, Any]:
    """The defaults of a method, or of a run without one."""
    method: Method | None = None if name is None else METHODS[name]
    adakd = method is None if given.adakd is None else given.adakd
    preset = method.options(adakd) if method is not None else {} if adakd else dict(WITHOUT_ADAKD)
    if given.divergence is not None or given.beta is not None:
        preset = {option: value for option, value in preset.items() if option not in DIVERGENCE}
    return {**preset, "adakd": adakd}


def _unknown(name: str, config_class: type[Any], dashes: str = "") -> str:
    """The error line for an option that does not exist, or not with this method."""
    written = name.removeprefix(dashes).replace("-", "_").partition("=")[0]
    if config_class is not AdaKDConfig and written in _option_names(AdaKDConfig):
        return f"option {written!r} does not go with methods whose student samples: {_listed_methods(on_policy=True)}"
    if config_class is AdaKDConfig:
        try:
            from .on_policy import OnPolicyConfig

            if written in _option_names(OnPolicyConfig):
                return f"option {written!r} needs a method whose student samples: {_listed_methods(on_policy=True)}"
        except ImportError:
            pass
    known = [dashes + option for option in _option_names(config_class)]
    return f"unknown option {name!r}{did_you_mean(dashes + written, known) or '; see adakd train --help'}"


def _content(path: Path) -> dict[str, Any]:
    """The options in a YAML file."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise CommandError(f"{path}: not YAML: {error}") from None
    if not isinstance(content, dict):
        raise CommandError(f"{path}: expected options as 'name: value', got {type(content).__name__}")
    return content


def _config_flags(path: Path, content: dict[str, Any], config_class: type[Any]) -> list[str]:
    """The options of a YAML file as flags, so that the parser checks the file as it checks the command line."""
    known = _option_names(config_class)
    flags: list[str] = []
    for name, value in content.items():
        if name not in known:
            raise CommandError(f"{path}: {_unknown(str(name), config_class)}")
        if value is None:
            continue
        if isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        else:
            flags.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return flags
