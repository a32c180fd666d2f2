"""Where documents start within training rows: after every end-of-document token."""

from collections.abc import Iterable
from dataclasses import replace

import torch

from megatron_cgn.batch import TokenBatch
from megatron_cgn.data.indexed import IndexInfo
from megatron_cgn.errors import DataError


def separate_documents(batch: TokenBatch, *, eod_id: int) -> TokenBatch:
    """Lay rows end to end into one packed row whose documents do not see one another.

    A row's first token starts a document, and so does a token behind an end-of-document token.
    Positions restart with each. Labels and what counts stay as they are: the label behind an
    end-of-document token, the next document's first token, is predicted from the document that
    ends, and counts. So every token of a text is predicted exactly once, as with joined documents,
    and bits per byte have the same bytes under them.

    Args:
        batch: Rows ``[B, S]`` on the CPU.
        eod_id: The end-of-document token.

    Returns:
        One row ``[1, B * S]`` with ``cu_seqlens``.
    """
    assert batch.cu_seqlens is None, "packed already"
    starts = torch.ones_like(batch.tokens, dtype=torch.bool)
    starts[:, 1:] = batch.tokens[:, :-1] == eod_id
    starts = starts.flatten()
    places = torch.arange(len(starts))
    first = torch.where(starts, places, 0).cummax(0).values
    return replace(
        batch,
        tokens=batch.tokens.view(1, -1),
        labels=batch.labels.view(1, -1),
        loss_mask=batch.loss_mask.view(1, -1),
        position_ids=(places - first)[None],
        cu_seqlens=torch.cat((places[starts], torch.tensor([len(starts)]))).int(),
        source_ids=None if batch.source_ids is None else batch.source_ids.view(1, -1),
    )


def check_boundaries(indices: Iterable[IndexInfo]) -> None:
    """Refuse indices that do not show where documents end.

    Args:
        indices: What a run reads whose documents are to be separated.

    Raises:
        DataError: Naming every such index.
    """
    faults = {
        f"{index.prefix}: its documents do not end with an end-of-document token (it was made "
        "with --no-append-eod), so data.reset_attention_mask=true cannot separate them. Make it "
        "again without that option, or set data.reset_attention_mask=false."
        for index in indices
        if index.sidecar.eod_id is None
    }
    if faults:
        raise DataError("\n".join(sorted(faults)))
