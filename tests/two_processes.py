"""Run by torchrun in a test: loss and gradients of both stages, and what mining drops, with the batch split over
processes."""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from gradients import backward
from mining import Miner
from safetensors.torch import save_file
from stage1 import Stage1Objective
from stage2 import Stage2Objective

from modeling_tscir import TSCIRModel, TSCIRProcessor


class Targets:
    """Rows as `Stage2Data` has them."""

    def __init__(self, rows: dict[str, torch.Tensor]):
        self.columns = rows
        self.target_embeds, self.target_ids = rows["target_embeds"], rows["target_ids"]

    def __getitems__(self, rows: list[int]) -> dict[str, torch.Tensor]:
        return {name: tensor[rows] for name, tensor in self.columns.items()}


def main(folder: Path) -> None:
    accelerator = Accelerator(cpu=True)
    data = torch.load(folder / "batches.pt", weights_only=True)
    found = {}
    for stage in (1, 2):
        model = TSCIRModel.from_pretrained(folder / f"stage{stage}").eval()
        processor = TSCIRProcessor.from_pretrained(folder / f"stage{stage}")
        trained = model.trainable_parameters()
        if stage == 1:
            objective = Stage1Objective(model, processor)
        else:
            miner = Miner(Targets(data["2"]), model, refresh=1)
            miner.rows, miner.mined, miner.mask = data["2"]["rows"], data["mined"], data["mask"]
            objective = Stage2Objective(model, miner)
        objective = accelerator.prepare(objective)
        size = len(next(iter(data[str(stage)].values()))) // accelerator.num_processes
        rows = slice(accelerator.process_index * size, (accelerator.process_index + 1) * size)
        batch = {name: tensor[rows] for name, tensor in data[str(stage)].items()}
        for chunk in (0, 3):
            terms = backward(accelerator, objective, batch, chunk)
            found |= {f"{stage} chunk {chunk} {name}": p.grad.clone() for name, p in trained.items()}
            found[f"{stage} chunk {chunk} loss"] = terms["loss"].detach().reshape(1)
            objective.zero_grad()
    counted = miner.mine(list(range(8))[rows], count=2, ceiling=0.1)
    found |= {name: torch.tensor([value]) for name, value in counted.items()}
    if accelerator.is_main_process:
        save_file(found, folder / f"gradients-{accelerator.num_processes}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
