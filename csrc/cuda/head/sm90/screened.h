// The screened head forward for max pooling on sm_90a: its task and its launch. Raw pointers of one device; independent
// of torch.
#pragma once

#include "cuda/head/sm90/dense.h"
#include "cuda/head/sm90/screen_candidates.h"
#include "cuda/head/sm90/screen_rows.h"

namespace splade_fast::cuda::sm90 {

struct ScreenedTask {
  // The full-precision product of the candidates or, with too many of them, of everything. Its keys are (batch,
  // vocabulary), of 8 bytes with positions or 4, zero before the launch; only_if is set.
  HeadTask head;
  const int8_t *weight, *tokens;  // rounded, with rows of screen_padded_dim(head.shape.dim)
  const ScreenTile* tiles;
  const ScreenEntry* entries;  // (vocabulary,)
  CandidatePair* candidates;   // (capacity,), filled by the launch
  unsigned long long* count;   // of candidates, zero before the launch; more than the capacity means too many
  int64_t capacity;
  int64_t* report;  // (4,), filled by the launch: the report of head_forward_screened
};

cudaError_t launch_screened_head(const ScreenedTask& task, int64_t multiprocessors, cudaStream_t stream);

}  // namespace splade_fast::cuda::sm90
