# What a CUDA build needs, asked for before anything is compiled. Whatever is missing is named and ends the
# configuration: a request for CUDA never yields a CPU build.

find_program(LLAMAMEM_NVCC nvcc
    HINTS "$ENV{CUDACXX}" "${CMAKE_CUDA_COMPILER}" "${CUDAToolkit_ROOT}/bin" "$ENV{CUDA_PATH}/bin" "$ENV{CUDA_HOME}/bin"
    PATHS /usr/local/cuda/bin /opt/cuda/bin)
if (NOT LLAMAMEM_NVCC)
    llamamem_refuse("CUDA: nvcc was not found on PATH or in /usr/local/cuda: "
                    "install the CUDA toolkit, or set CUDAToolkit_ROOT to where it is")
endif()

execute_process(COMMAND "${LLAMAMEM_NVCC}" --list-gpu-arch
    OUTPUT_VARIABLE LLAMAMEM_NVCC_ARCHS ERROR_VARIABLE LLAMAMEM_NVCC_ERROR RESULT_VARIABLE LLAMAMEM_NVCC_RESULT)
string(REGEX MATCHALL "compute_[0-9]+[a-z]?" LLAMAMEM_NVCC_ARCHS "${LLAMAMEM_NVCC_ARCHS}")
list(TRANSFORM LLAMAMEM_NVCC_ARCHS REPLACE "compute_" "")
if (NOT LLAMAMEM_NVCC_RESULT EQUAL 0 OR NOT LLAMAMEM_NVCC_ARCHS)
    llamamem_refuse("CUDA: ${LLAMAMEM_NVCC} does not run (${LLAMAMEM_NVCC_RESULT}): reinstall the CUDA toolkit")
endif()

# Without a name, the GPUs that are here; "native" without a GPU would quietly give an architecture of no use.
set(LLAMAMEM_ARCHS "${LLAMAMEM_CUDA_ARCH}")
if (NOT LLAMAMEM_ARCHS)
    execute_process(COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
        OUTPUT_VARIABLE LLAMAMEM_ARCHS ERROR_QUIET RESULT_VARIABLE LLAMAMEM_SMI_RESULT)
    string(REGEX MATCHALL "[0-9]+\\.[0-9]+" LLAMAMEM_ARCHS "${LLAMAMEM_ARCHS}")
    list(TRANSFORM LLAMAMEM_ARCHS REPLACE "\\." "")
    list(REMOVE_DUPLICATES LLAMAMEM_ARCHS)
    if (NOT LLAMAMEM_SMI_RESULT EQUAL 0 OR NOT LLAMAMEM_ARCHS)
        llamamem_refuse("CUDA: nvidia-smi shows no GPU here to build for: name the architecture, as in --arch 90")
    endif()
endif()
list(JOIN LLAMAMEM_NVCC_ARCHS " " LLAMAMEM_NVCC_ARCHS_TEXT)
foreach (ARCH IN LISTS LLAMAMEM_ARCHS)
    string(REGEX REPLACE "(-real|-virtual)$" "" ARCH_NAME "${ARCH}")
    string(REGEX REPLACE "[a-z]$" "" ARCH_NAME "${ARCH_NAME}")
    if (NOT ARCH_NAME IN_LIST LLAMAMEM_NVCC_ARCHS)
        llamamem_refuse("CUDA: architecture ${ARCH} is not one that ${LLAMAMEM_NVCC} compiles for "
                        "(${LLAMAMEM_NVCC_ARCHS_TEXT}): name one of these with --arch, or install another toolkit")
    endif()
    if (ARCH_NAME LESS 75)
        llamamem_refuse("CUDA: architecture ${ARCH} is older than 75, the oldest this runtime is built for")
    endif()
endforeach()

find_package(CUDAToolkit QUIET)
if (NOT CUDAToolkit_FOUND OR NOT TARGET CUDA::cudart)
    llamamem_refuse("CUDA: ${LLAMAMEM_NVCC} is there, but the CUDA runtime (cuda_runtime.h, libcudart) is not: "
                    "install the toolkit's cudart development package")
endif()
find_file(LLAMAMEM_CUBLAS_H cublas_v2.h HINTS ${CUDAToolkit_INCLUDE_DIRS})
if (NOT TARGET CUDA::cublas OR NOT LLAMAMEM_CUBLAS_H)
    llamamem_refuse("CUDA: cuBLAS (cublas_v2.h, libcublas) was not found for the toolkit "
                    "${CUDAToolkit_VERSION} of ${LLAMAMEM_NVCC}: install its cuBLAS development package")
endif()

set(CMAKE_CUDA_COMPILER      "${LLAMAMEM_NVCC}"  CACHE FILEPATH "" FORCE)
set(CMAKE_CUDA_ARCHITECTURES "${LLAMAMEM_ARCHS}" CACHE STRING   "" FORCE)
