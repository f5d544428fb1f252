"""Deliberate mistakes in the CUDA sources: each is off until a test switches it on."""

from typing import NamedTuple


class Mistake(NamedTuple):
    """Replacement of one expression by a wrong one."""

    file: str  # in csrc
    correct: str
    wrong: str = "void()"  # instead of a call
    behind: str = ""  # the text in front of the expression, where it occurs several times

    def switchable(self, name: str) -> str:
        """Return the expression that is wrong while the mistake of this name is on."""
        return f'(emulation::has_mistake("{name}") ? {self.wrong} : {self.correct})'


_SEARCH = "cuda/score/search.cu"
_PRODUCT = "cuda/head/sm90/product.cuh"
_THRESHOLD = "cuda/head/sm90/screen_threshold.h"
_SCREENED = "cuda/head/sm90/screened.cu"

MISTAKES = {
    "pool_without_barrier": Mistake(
        "cuda/pool.cu", "__syncthreads_or(has_real_row)", "has_real_row"
    ),
    "score_without_barrier": Mistake("cuda/score/documents.cuh", "__syncthreads()"),
    "search_in_the_first_wave": Mistake(_SEARCH, "first_id + n", "n"),
    "head_without_wait": Mistake(_PRODUCT, "wait(full + ring.stage * 8, ring.parity)"),
    "head_with_early_release": Mistake(_PRODUCT, "wgmma_wait<1>()"),
    "head_with_wrong_tile": Mistake(_PRODUCT, "token + rank * (kTileTokens / kCluster)", "token"),
    "head_without_whole_warps": Mistake("cuda/head/sm90/dense.cu", "__syncwarp()"),
    "screen_without_residual": Mistake(_THRESHOLD, "tile.residual * entry.norm", "0"),
    "screen_without_residual_of_entries": Mistake(_THRESHOLD, "tile.norm * entry.residual", "0"),
    "screen_without_last_token": Mistake(_SCREENED, "rows - first_row", "rows - first_row - 1"),
    "screen_of_a_stale_weight": Mistake(
        "cuda/head/sm90/screen_rows.cu", "to_bits(sample) != to_bits(fact(kWeightSample))", "false"
    ),
    "screen_without_fallback": Mistake(
        "cuda/head/sm90/dense.h", "count == nullptr || *count > more_than", "count == nullptr"
    ),
}

# Mistakes that show in results at few orders of the threads, if at any. The race detector finds
# them in each order.
RACES = {
    "prune_without_barrier": Mistake(
        "cuda/selection.cuh", "__syncthreads()", behind="tile += kTile<Key>;\n  }\n  "
    ),
    "sort_without_barrier": Mistake(
        "cuda/block.cuh", "__syncthreads()", behind="larger;\n    }\n  }\n  "
    ),
    "sums_without_barrier": Mistake(
        "cuda/block.cuh", "__syncthreads()", behind="sums.total += of_warps[warp];\n  }\n  "
    ),
    "head_backward_without_warp_barrier": Mistake(
        "cuda/head/backward.cu", "__syncwarp()", behind="offsets[i] = 0;\n    "
    ),
    "head_without_last_wait": Mistake(_PRODUCT, "wgmma_wait<0>()"),
    "scatter_by_several_blocks": Mistake("cuda/gather.cu", "last[index] == lane.row + 1", "true"),
}

# Mistakes that read or write outside of memory, or at an address that the access does not allow.
MEMORY = {
    "gather_beyond_the_row": Mistake(
        "cuda/gather.cu",
        "i < count",
        "i <= count",
        behind="#pragma unroll 4\n  for (int64_t i = lane; ",
    ),
    "gather_by_the_widest_access": Mistake(
        "cuda/gather.cu", "all % static_cast<uintptr_t>(width) != 0", "false"
    ),
    "pack_beyond_the_rows": Mistake(
        "cuda/head/sm90/pack.cuh",
        "min(round_up(count, sm90::kTileTokens), task.sequences.rows)",
        "round_up(count, sm90::kTileTokens)",
    ),
    "search_with_short_lists": Mistake(_SEARCH, "k + kSpare + most_", "k"),
    "prune_beyond_the_buffer": Mistake("cuda/selection.cuh", "place >= kCapacity<Key>", "false"),
}
