"""Rows whose devices belong to several hosts: two processes that find each other, as hosts do."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Each of two hosts reads half of the rows, whole; every device ends with its part of the batch.
HOST = """
import sys
import jax, numpy as np
from glm45_jax import sharding
from glm45_jax.sharding import MeshShape, Rules
me, port = int(sys.argv[1]), sys.argv[2]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, me)
B, T, rules = 8, 12, Rules()
rows_BT = np.arange(B * T, dtype=np.int32).reshape(B, T)
names_B = np.arange(B, dtype=np.int32)
mine = slice(me * B // 2, (me + 1) * B // 2)
for shape in (MeshShape(1, fsdp=1, context=4), MeshShape(1, fsdp=2, context=2), MeshShape(1)):
    mesh = sharding.make_mesh(shape)
    put_BT, put_B = sharding.put((rows_BT[mine], names_B[mine]), mesh, rules)
    assert put_BT.sharding.spec == rules.spec(("batch", "seq")), put_BT.sharding
    for put, whole in ((put_BT, rows_BT), (put_B, names_B)):
        assert put.shape == whole.shape
        for shard in put.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), whole[shard.index])
try:
    sharding.put(rows_BT[:1], sharding.make_mesh(MeshShape(1, fsdp=1, context=4)), rules)
except ValueError as error:
    print(error)
"""


def test_hosts_that_share_a_row_each_read_whole_rows_of_their_own():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2", "PYTHONPATH": path}
    line = [sys.executable, "-c", HOST]
    hosts = [
        subprocess.Popen([*line, str(n), port], env=env, stdout=-1, stderr=-1, text=True)
        for n in range(2)
    ]
    ended = [host.communicate(timeout=240) for host in hosts]
    for host, (out, err) in zip(hosts, ended, strict=True):
        assert host.returncode == 0, err
        assert "batch of 2 rows is not a multiple of 4 devices" in out  # a host has half a row
