"""Writes the fixtures megatron_{u8,i16,i32,i64,u16}.{bin,idx}: indexed datasets in Megatron-LM's layout.

Written from the description of the layout (megatron/core/datasets/indexed_dataset.py), with nothing but `struct`, so
that Cairn's reader is tested against something other than Cairn's writer. Run it in this folder:

    python3 megatron.py
"""

import struct

# Three documents; the second has two sequences, the last sequence is empty.
DOCUMENTS = [[[1, 2, 3]], [[40, 41], [42]], [[7, 50000, 9, 10], []]]


def write(name, code, form, clip):
    documents = [[[min(token, clip) for token in sequence] for sequence in document] for document in DOCUMENTS]
    sequences = [sequence for document in documents for sequence in document]
    with open(name + ".bin", "wb") as out:
        for sequence in sequences:
            out.write(struct.pack(f"<{len(sequence)}{form}", *sequence))
    boundaries = [0]
    for document in documents:
        boundaries.append(boundaries[-1] + len(document))
    size = struct.calcsize("<" + form)
    pointers, at = [], 0
    for sequence in sequences:
        pointers.append(at)
        at += len(sequence) * size
    with open(name + ".idx", "wb") as out:
        out.write(b"MMIDIDX\x00\x00")
        out.write(struct.pack("<Q", 1))
        out.write(struct.pack("<B", code))
        out.write(struct.pack("<Q", len(sequences)))
        out.write(struct.pack("<Q", len(boundaries)))
        out.write(struct.pack(f"<{len(sequences)}i", *map(len, sequences)))
        out.write(struct.pack(f"<{len(pointers)}q", *pointers))
        out.write(struct.pack(f"<{len(boundaries)}q", *boundaries))


write("megatron_u8", 1, "B", 255)
write("megatron_i16", 3, "h", 32767)
write("megatron_i32", 4, "i", 50000)
write("megatron_i64", 5, "q", 50000)
write("megatron_u16", 8, "H", 50000)
