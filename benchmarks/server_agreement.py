"""The same model in transformers and through llama.cpp's server: how often do they say the same, and why not always?

    python benchmarks/server_agreement.py MODEL_FOLDER MODEL.gguf [--count 100]

Ways to run the weights of one GGUF file: dequantized in transformers (fp32), as they are in llama.cpp (4-bit blocks
times activations that it rounds to 8 bits), and dequantized in llama.cpp (an F32 GGUF, made here), with its cache of
keys and values in fp16 as a rule, or in fp32. If the first and the last agree and the second does not, the difference
is rounding, and not prompt, sampling or template.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import xllamacpp

from rlmerge.evaluate.backend import Asked, Sampling
from rlmerge.evaluate.run import TransformersBackend, load_model, stops_of
from rlmerge.evaluate.server import ServerBackend
from rlmerge.evaluate.tasks import load_task
from rlmerge.evaluate.verifiers import completed, verify


def dequantize(source: Path, out: Path) -> None:
    """Writes the file anew with every tensor in fp32; everything else stays."""
    reader = gguf.GGUFReader(source)
    kind = reader.fields["general.architecture"]
    writer = gguf.GGUFWriter(out, bytes(kind.parts[kind.data[-1]]).decode())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        value_type = field.types[0]
        sub_type = field.types[-1] if value_type == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), value_type, sub_type=sub_type)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, np.ascontiguousarray(values, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def serve(model: Path, wide_cache: bool = False) -> Any:
    """llama.cpp's server in this process; keys and values are fp16 there unless asked for fp32."""
    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_ctx, params.n_parallel, params.port, params.warmup = 2048, 1, 0, False
    params.cpuparams.n_threads = 2
    if wide_cache:
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    return xllamacpp.Server(params)


def main() -> None:
    """Prints agreement and accuracy of each way, per task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--tasks", nargs="+", default=["math:1", "gym:gsm_symbolic"])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        plain = Path(scratch) / "f32.gguf"
        dequantize(args.gguf, plain)
        said: dict[str, dict[str, dict[str, str]]] = {task: {} for task in args.tasks}
        tasks = {name: load_task(name, "test", args.count) for name in args.tasks}
        for way in ("transformers fp32", "llama.cpp as stored", "llama.cpp F32", "llama.cpp F32, cache too"):
            server = None
            if way == "transformers fp32":
                backend: Any = TransformersBackend(*load_model(args.folder))
            else:
                server = serve(args.gguf if way.endswith("stored") else plain, way.endswith("too"))
                backend = ServerBackend(f"{server.listening_address}/v1", "model", parallel=1)
            for name, task in tasks.items():
                asked = [Asked(problem.id, problem, 0, stops_of(problem)) for problem in task.problems]
                sampling = Sampling(0.0, args.tokens)
                made = {one.key: one for one in backend.run(asked, sampling)}
                problems = list(task.problems)
                texts = [completed(made[p.id].text, made[p.id].finish, p) for p in problems]
                right = sum(verdict.correct for verdict in verify(texts, problems)) / len(problems)
                said[name][way] = {problem.id: made[problem.id].text for problem in problems}
                first = said[name]["transformers fp32"]
                same = sum(said[name][way][key] == first[key] for key in first) / len(first)
                print(
                    json.dumps({"task": name, "way": way, "accuracy": right, "same as transformers": same}), flush=True
                )
            del server


if __name__ == "__main__":
    main()
