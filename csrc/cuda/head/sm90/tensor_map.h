// Descriptions of matrices for the copy engine of sm_90a. Host functions; raw pointers of one device.
#pragma once

#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include <array>
#include <utility>

#include "cuda/head/sm90/layout.h"

namespace splade_fast::cuda::hopper {

using EncodeTensorMap = PFN_cuTensorMapEncodeTiled_v12000;

// Found in the loaded driver, so that the library need not link to one.
inline EncodeTensorMap find_encode_tensor_map() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result{};
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
  return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<EncodeTensorMap>(function)
                                                                       : nullptr;
}

inline CUtensorMapDataType tensor_map_type(Operand operand) {
  switch (operand) {
    case Operand::kBfloat16:
      return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    case Operand::kFloat16:
      return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    // The copy engine rounds float32 to TF32; wgmma would truncate.
    case Operand::kTfloat32:
      return CU_TENSOR_MAP_DATA_TYPE_TFLOAT32;
    default:
      return CU_TENSOR_MAP_DATA_TYPE_UINT8;
  }
}

// A row-major matrix (rows, dim), copied in boxes of box_rows x row_elements(operand). Elements outside the matrix read
// as 0.
struct TiledMatrix {
  const void* data;
  int64_t rows, dim;
  int box_rows;
  Operand operand;

  bool operator==(const TiledMatrix& other) const {
    return data == other.data && rows == other.rows && dim == other.dim && box_rows == other.box_rows &&
           operand == other.operand;
  }
};

// Describes a matrix for the copy engine.
inline cudaError_t encode_tensor_map(CUtensorMap& map, const TiledMatrix& matrix) {
  static const EncodeTensorMap encode = find_encode_tensor_map();
  if (encode == nullptr) return cudaErrorNotSupported;
  const auto& [data, rows, dim, box_rows, operand] = matrix;
  const cuuint64_t sizes[]{static_cast<cuuint64_t>(dim), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[]{static_cast<cuuint64_t>(dim * element_bytes(operand))};
  const cuuint32_t box[]{static_cast<cuuint32_t>(row_elements(operand)), static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t element_strides[]{1, 1};
  const CUresult result = encode(&map, tensor_map_type(operand), 2, const_cast<void*>(data), sizes, strides, box,
                                 element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// The same. The last few of a thread are kept, for the weight stays where it is from call to call. A map is made of
// these numbers alone, so one that was kept is right for whatever lies there now.
inline cudaError_t make_tensor_map(CUtensorMap& map, const TiledMatrix& matrix) {
  constexpr size_t kKept = 8;
  thread_local std::array<std::pair<TiledMatrix, CUtensorMap>, kKept> kept{};
  thread_local size_t oldest = 0;
  for (const auto& [described, known] : kept) {
    if (!(described == matrix)) continue;
    map = known;
    return cudaSuccess;
  }
  const cudaError_t error = encode_tensor_map(map, matrix);
  if (error == cudaSuccess) kept[oldest++ % kKept] = {matrix, map};
  return error;
}

}  // namespace splade_fast::cuda::hopper
