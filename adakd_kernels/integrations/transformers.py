"""AdaKD on transformers' `Trainer`: `AdaKDTrainer` and `AdaKDConfig`, and what feeds them.

    trainer = AdaKDTrainer(
        model=student,
        teacher=teacher,
        args=AdaKDConfig(output_dir="out", divergence="reverse_kl"),
        train_dataset="train.jsonl",
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=last_checkpoint("out"))

One process or `torchrun` / `accelerate launch` with one device a process: data parallelism
(DistributedDataParallel) or tensor parallelism.
"""

from __future__ import annotations

# Both first, so that a missing one gives the cure and not an error from inside the trainer.
try:
    import accelerate  # noqa: F401
    import datasets  # noqa: F401
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"AdaKDTrainer needs transformers, accelerate and datasets: pip install 'adakd-kernels[train]' ({error})"
    ) from error

from ..trainer.checkpoints import last_checkpoint
from ..trainer.collator import AdaKDDataCollator
from ..trainer.config import AdaKDConfig
from ..trainer.finite import NonFiniteLossError
from ..trainer.loading import LoadedRecords, load_records
from ..trainer.methods import METHODS
from ..trainer.records import DataError, check_same_tokenizer, tokenize_messages
from ..trainer.trainer import AdaKDTrainer

__all__ = [
    "METHODS",
    "AdaKDConfig",
    "AdaKDDataCollator",
    "AdaKDTrainer",
    "DataError",
    "LoadedRecords",
    "NonFiniteLossError",
    "check_same_tokenizer",
    "last_checkpoint",
    "load_records",
    "tokenize_messages",
]
