"""Two processes that save one state dict together, as a training would; run by the tests of distributed checkpoints."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor


def whole() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return {
        "rows": draw(8, 6),
        "uneven": draw(7, 5, dtype=torch.bfloat16),
        "columns": draw(6, 10),
        "middle": draw(3, 4, 5, dtype=torch.float16),
        "fewer_rows_than_ranks": draw(1, 4),
        "replicated": draw(5),
        "scalar": torch.tensor(3.5),
        "counts": torch.arange(6),
    }


def main(rank: int, port: int, home: str) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    cuts = {"columns": Shard(1), "middle": Shard(1), "replicated": Replicate(), "scalar": Replicate()}
    model = {
        name: distribute_tensor(value, mesh, [cuts.get(name, Shard(0))])
        for name, value in whole().items()
        if name != "counts"
    }
    model["counts"] = distribute_tensor(whole()["counts"], mesh, [Shard(0)])
    dcp.save(model, storage_writer=dcp.HuggingFaceStorageWriter(f"{home}/safetensors", save_distributed=True))
    state = {
        "model": model,
        "optimizer": {"state": {"rows": {"exp_avg": distribute_tensor(torch.ones(8, 6), mesh, [Shard(0)])}}},
        "step": 7,
    }
    dcp.save(state, checkpoint_id=f"{home}/distcp")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
