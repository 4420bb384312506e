"""What turns one JSONL file into token files, each in a process of its own that bench/data.py starts.

    python bench/data_contestants.py NAME JSON

It prints one JSON object: seconds from the start of the work, imports done, until all files are written and closed, and
those of all cores that it and its workers used; tokens written; peak memory.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import resource
import sys
import time
from pathlib import Path


def forgetrain(job: dict) -> int:
    """``forgetrain data build``, with hashing, held-out documents and the manifest."""
    build = importlib.import_module("forgetrain.data.build")
    target = importlib.import_module("forgetrain.spec.target").parse_target(job["target"])
    clock()
    data = build.build_data(target, Path(job["out"]) / "data", workers=job["workers"])
    return sum(entry["tokens"] for entry in data.manifest["sources"])


class Megatron:
    """The way of Megatron-LM's tools/preprocess_data.py with --append-eod: a pool fed 32 lines at a time, each line
    tokenised by megatron-core's Hugging Face tokenizer, documents written by its IndexedDatasetBuilder."""

    tokenizer = None

    @classmethod
    def start(cls, folder: str) -> None:
        library = importlib.import_module("megatron.core.tokenizers.text.libraries.huggingface_tokenizer")
        cls.tokenizer = library.HuggingFaceTokenizer(folder)

    @classmethod
    def encode(cls, line: str) -> list[int]:
        return [*cls.tokenizer.text_to_ids(json.loads(line)["text"]), cls.tokenizer.eod]


def megatron(job: dict) -> int:
    indexed = importlib.import_module("megatron.core.datasets.indexed_dataset")
    importlib.import_module("megatron.core.tokenizers.text.libraries.huggingface_tokenizer")
    prefix, tokens = f"{job['out']}/megatron", 0
    dtype = indexed.DType.optimal_dtype(job["target"]["model"]["vocab_size"])
    clock()
    builder = indexed.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    with (
        open(job["file"], encoding="utf-8") as lines,
        multiprocessing.Pool(job["workers"], Megatron.start, (job["tokenizer"],)) as pool,
    ):
        for ids in pool.imap(Megatron.encode, lines, 32):
            builder.add_document(ids, [len(ids)])
            tokens += len(ids)
        builder.finalize(f"{prefix}.idx")
    return tokens


def datatrove(job: dict) -> int:
    """datatrove shares files among its tasks, not lines: it is given the file in as many parts as workers, and its one
    token file for each part is taken as the end."""
    executor = importlib.import_module("datatrove.executor").LocalPipelineExecutor
    reader = importlib.import_module("datatrove.pipeline.readers").JsonlReader
    writer = importlib.import_module("datatrove.pipeline.tokens").DocumentTokenizer
    importlib.import_module("loguru").logger.remove()
    steps = [
        reader(job["parts"]),
        writer(
            f"{job['out']}/datatrove",
            tokenizer_name_or_path=f"{job['tokenizer']}/tokenizer.json",
            eos_token="</s>",
            shuffle_documents=False,
        ),
    ]
    clock()
    workers = {"tasks": job["workers"], "workers": job["workers"], "start_method": "fork"}  # the quickest to start
    executor(pipeline=steps, logging_dir=f"{job['out']}/logs", **workers).run()
    sizes = [path.stat().st_size for path in Path(job["out"], "datatrove").rglob("*.ds")]
    return sum(sizes) // (2 if job["target"]["model"]["vocab_size"] < 2**16 else 4)


CONTESTANTS = {"forgetrain": forgetrain, "megatron": megatron, "datatrove": datatrove}
BEGAN = {"seconds": 0.0, "core_seconds": 0.0}


def clock() -> None:
    BEGAN.update(now())


def now() -> dict[str, float]:
    used = [resource.getrusage(which) for which in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return {"seconds": time.monotonic(), "core_seconds": sum(one.ru_utime + one.ru_stime for one in used)}


def main() -> None:
    name, job = sys.argv[1], json.loads(sys.argv[2])
    tokens = CONTESTANTS[name](job)
    took = {key: value - BEGAN[key] for key, value in now().items()}
    peak = {
        who: resource.getrusage(which).ru_maxrss // 1024
        for who, which in (("self_mib", resource.RUSAGE_SELF), ("largest_child_mib", resource.RUSAGE_CHILDREN))
    }
    print(json.dumps({**took, "tokens": tokens, **peak}))


if __name__ == "__main__":
    main()
