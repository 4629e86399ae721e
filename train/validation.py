"""Retrieval among rows held out of the training data: no benchmark is needed to see when to stop."""

from collections.abc import Iterable, Sequence

import torch
from gradients import Objective

from modeling_tscir.metrics import recall_at_k
from modeling_tscir.ranking import rank_gallery


class Validation:
    """Ranks a gallery of all held-out pictures for every held-out row, as the weights are when it is called.

    Args:
        objective: says which of its features are `target` and `reference`; a query's own reference is not ranked.
        batches: of held-out rows; their frozen features are computed here, once.
        pictures: of each row's target and then of each row's reference, the first place among these with the same
            picture. Embeddings do not tell: one picture's differ in their last bits by the batch it was in.
    """

    def __init__(
        self,
        objective: Objective,
        batches: Iterable[dict[str, torch.Tensor]],
        pictures: Sequence[int] | None = None,
    ):
        self.objective, self.pictures = objective, pictures
        self.features = []
        for batch in batches:
            features = objective.frozen({k: v.to(objective.device) for k, v in batch.items()})
            self.features.append({k: v.cpu() for k, v in features.items()})

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        """Recall at 1 and 10, mean reciprocal rank, and mean cosine of queries and their pictures."""
        objective = self.objective
        was_training = objective.training
        objective.eval()
        queries, targets, references = [], [], []
        for features in self.features:
            on_device = {k: v.to(objective.device) for k, v in features.items()}
            queries.append(objective(on_device).float().cpu())
            targets.append(features[objective.target].float())
            references.append(features[objective.reference].float())
        objective.train(was_training)
        queries, targets, references = torch.cat(queries), torch.cat(targets), torch.cat(references)
        gallery = torch.cat([targets, references])
        if self.pictures is None:
            gallery, rows = gallery.unique(dim=0, return_inverse=True)
        else:
            places, rows = torch.tensor(self.pictures).unique(return_inverse=True)
            gallery = gallery[places]
        truths, own = rows[: len(targets)].tolist(), rows[len(targets) :].tolist()
        exclude = [[r] if r != t else [] for r, t in zip(own, truths, strict=True)]
        ranks = rank_gallery(queries, gallery, 1, truths=[[t] for t in truths], exclude=exclude).truth_ranks[:, 0]
        return {
            "validation_recall_at_1": recall_at_k(ranks, 1),
            "validation_recall_at_10": recall_at_k(ranks, 10),
            "validation_mrr": float((1 / ranks.double()).mean()),
            "validation_similarity": float((queries * targets).sum(-1).mean()),
        }
