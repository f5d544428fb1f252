# The CUDA library. CUDA_HOME, CUDA_PATH or nvcc on PATH chooses the toolkit. TORCH_CUDA_ARCH_LIST chooses the GPUs, in
# the notation of torch: "8.0 9.0a+PTX".
include(CheckLanguage)

# Toolkit ----------------------------------------------------------------------------------------------------------
foreach(variable CUDA_HOME CUDA_PATH)
  if(NOT CMAKE_CUDA_COMPILER AND NOT "$ENV{${variable}}" STREQUAL "")
    set(CMAKE_CUDA_COMPILER "$ENV{${variable}}/bin/nvcc")
  endif()
endforeach()

# Architectures ----------------------------------------------------------------------------------------------------
# 8.0 stands for sm_80, and +PTX adds compute_80. Code for sm_80 also runs on 8.6 and 8.9, its PTX on all later GPUs.
set(architectures "$ENV{TORCH_CUDA_ARCH_LIST}")
if(architectures STREQUAL "")
  set(architectures "8.0+PTX 9.0a")
endif()
string(REGEX REPLACE "[ ,;]+" ";" architectures "${architectures}")
set(CMAKE_CUDA_ARCHITECTURES "")
foreach(architecture ${architectures})
  if(NOT architecture MATCHES "^([0-9]+)\\.([0-9]a?)(\\+PTX)?$")
    message(FATAL_ERROR "TORCH_CUDA_ARCH_LIST: '${architecture}' is not of the form 8.0, 9.0a or 8.0+PTX")
  endif()
  set(number "${CMAKE_MATCH_1}${CMAKE_MATCH_2}")
  list(APPEND CMAKE_CUDA_ARCHITECTURES ${number}-real)
  string(APPEND SPLADE_FAST_CUDA_ARCHITECTURES "sm_${number} ")
  if(CMAKE_MATCH_3)
    list(APPEND CMAKE_CUDA_ARCHITECTURES ${number}-virtual)
    string(APPEND SPLADE_FAST_CUDA_ARCHITECTURES "compute_${number} ")
  endif()
endforeach()
string(STRIP "${SPLADE_FAST_CUDA_ARCHITECTURES}" SPLADE_FAST_CUDA_ARCHITECTURES)

# Library ----------------------------------------------------------------------------------------------------------
check_language(CUDA)
if(CMAKE_CUDA_COMPILER)
  enable_language(CUDA)
  set(SPLADE_FAST_CUDA_VERSION "${CMAKE_CUDA_COMPILER_VERSION}")
  set(CMAKE_CUDA_STANDARD 17)
  set(CMAKE_CUDA_STANDARD_REQUIRED ON)
  add_library(ops_cuda SHARED
    csrc/cuda/gather.cu
    csrc/cuda/pool.cu
    csrc/cuda/prune.cu
    csrc/cuda/sample.cu
    csrc/cuda/score/score.cu
    csrc/cuda/score/search.cu
    csrc/cuda/head/backward.cu
    csrc/cuda/head/forward.cu
    csrc/cuda/head/sm90/dense.cu
    csrc/cuda/head/sm90/pack.cu
    csrc/cuda/head/sm90/screen_rows.cu
    csrc/cuda/head/sm90/screened.cu
    csrc/cuda/head/sm90/screened_op.cu)
  # ptxas reports registers and spills in the build log, and a spill is an error.
  target_compile_options(ops_cuda PRIVATE -O3 -lineinfo --expt-relaxed-constexpr -Werror all-warnings
                         -Xcompiler -Wall "-Xptxas=-v,-warn-spills,-Werror")
  set_target_properties(ops_cuda PROPERTIES CUDA_COMPILER_LAUNCHER "sh;${CMAKE_CURRENT_LIST_DIR}/keep_report.sh")
  target_compile_definitions(ops_cuda PRIVATE USE_CUDA)
  # Only sm_90a itself has wgmma and its companions: its PTX does not run on later GPUs.
  if("90a-real" IN_LIST CMAKE_CUDA_ARCHITECTURES)
    target_compile_definitions(ops_cuda PRIVATE SPLADE_FAST_BUILT_FOR_SM90A)
    set(SPLADE_FAST_CUDA_KERNELS "head_sm90a")
  endif()
  # Python hides the symbols of libtorch_cuda.so from libraries that do not name it as a dependency. A CPU build of
  # torch has no such file, so an empty library of that name is linked. At run time the loader uses the libtorch_cuda.so
  # that torch has already loaded.
  file(WRITE "${CMAKE_CURRENT_BINARY_DIR}/torch_cuda/empty.cpp" "")
  add_library(torch_cuda_name SHARED "${CMAKE_CURRENT_BINARY_DIR}/torch_cuda/empty.cpp")
  set_target_properties(torch_cuda_name PROPERTIES OUTPUT_NAME torch_cuda
                        LIBRARY_OUTPUT_DIRECTORY "${CMAKE_CURRENT_BINARY_DIR}/torch_cuda")
  target_link_options(ops_cuda PRIVATE "LINKER:--no-as-needed")
  # The empty library is linked as a file: a target would have to be installed too.
  add_dependencies(ops_cuda torch_cuda_name)
  target_link_libraries(ops_cuda PRIVATE sources torch_stable "$<TARGET_FILE:torch_cuda_name>")
  set_target_properties(ops_cuda PROPERTIES PREFIX "" OUTPUT_NAME _ops_cuda SUFFIX ".so" INSTALL_RPATH ""
                        CUDA_RUNTIME_LIBRARY Static)
  list(APPEND installed ops_cuda)
  message(STATUS "splade_fast: CUDA library: yes, nvcc ${SPLADE_FAST_CUDA_VERSION}")
elseif(SPLADE_FAST_CUDA STREQUAL "1")
  message(FATAL_ERROR "SPLADE_FAST_CUDA=1, but no nvcc was found: set CUDA_HOME, or put nvcc on PATH")
else()
  set(SPLADE_FAST_CUDA_ARCHITECTURES "")
  message(WARNING "splade_fast: CUDA library: NO, no nvcc was found (set CUDA_HOME; SPLADE_FAST_CUDA=1 makes this an error, SPLADE_FAST_CUDA=0 silences it)")
endif()
