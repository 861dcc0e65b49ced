"""Put a checkpoint's tensors together with nothing but Python's safetensors.

Usage: read_checkpoint.py STORE_FOLDER JOB STEP [OUTPUT_FOLDER]

Opens every object of the step, joins the slices `<state>/<tensor>@<first element>` by their names, checks that they cover
each tensor exactly, and prints one line a tensor: name, shape, SHA-256 of its bytes. With OUTPUT_FOLDER it also writes the
bytes of each tensor, little-endian, to OUTPUT_FOLDER/<state>/<tensor>.
Needs: pip install safetensors numpy
"""

import hashlib
import json
import pathlib
import sys

import numpy as np
from safetensors import safe_open


def main() -> None:
    store, job, step = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    output = pathlib.Path(sys.argv[4]) if len(sys.argv) > 4 else None
    pieces: dict[str, dict[int, np.ndarray]] = {}
    shapes: dict[str, list[int]] = {}
    files = [f for f in (store / "jobs" / job / "objects").rglob("*.safetensors") if int(f.name.split("-")[0]) == step]
    assert files, f"no objects of step {step}"
    for path in sorted(files):
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata()
            shapes.update(json.loads(metadata["cairn.shapes"]))
            for key in file.keys():
                name, first = key.rsplit("@", 1)
                pieces.setdefault(name, {})[int(first)] = file.get_tensor(key)
    for name in sorted(pieces):
        shape = shapes[name.split("/", 1)[1]]
        at = 0
        parts = []
        for first in sorted(pieces[name]):
            assert first == at, f"{name}: slice at {first}, expected {at}"
            parts.append(pieces[name][first])
            at += parts[-1].size
        whole = np.concatenate(parts).reshape(shape)
        if output is not None:
            state, tensor = name.split("/", 1)
            (output / state).mkdir(parents=True, exist_ok=True)
            (output / state / tensor).write_bytes(whole.astype(whole.dtype.newbyteorder("<")).tobytes())
        print(f"{name} {shape} {hashlib.sha256(whole.tobytes()).hexdigest()}")


if __name__ == "__main__":
    main()
