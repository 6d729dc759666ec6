# What a CUDA build needs, asked for before anything is compiled. Whatever is missing is named and ends the
# configuration: a request for CUDA never yields a CPU build.

# Where users have it: a toolkit of the system, CUDA_HOME, conda, the nvidia-* wheels of the Python that builds.
if (NOT DEFINED LLAMAMEM_NVIDIA_WHEELS)
    execute_process(
        COMMAND "${Python_EXECUTABLE}" -c "import glob, sys; print(*(d for p in sys.path for d in sorted(glob.glob(p + '/nvidia/*'))), sep=';', end='')"
        OUTPUT_VARIABLE LLAMAMEM_NVIDIA_WHEELS)
endif()
set(LLAMAMEM_CUDA_ROOTS "${CUDAToolkit_ROOT}")
foreach (NAME CUDA_HOME CUDA_PATH CONDA_PREFIX)
    if (DEFINED ENV{${NAME}})
        list(APPEND LLAMAMEM_CUDA_ROOTS "$ENV{${NAME}}" "$ENV{${NAME}}/targets/x86_64-linux")
    endif()
endforeach()
list(APPEND LLAMAMEM_CUDA_ROOTS /usr/local/cuda /opt/cuda ${LLAMAMEM_NVIDIA_WHEELS})

set(LLAMAMEM_NVCC_HINTS ${LLAMAMEM_CUDA_ROOTS})
list(TRANSFORM LLAMAMEM_NVCC_HINTS APPEND "/bin")
find_program(LLAMAMEM_NVCC nvcc HINTS "$ENV{CUDACXX}" "${CMAKE_CUDA_COMPILER}" PATHS ${LLAMAMEM_NVCC_HINTS})
if (NOT LLAMAMEM_NVCC)
    llamamem_refuse("CUDA: nvcc was not found on PATH, in CUDA_HOME, /usr/local/cuda, conda or Python's nvidia-* packages: "
                    "install the CUDA toolkit, or `pip install nvidia-cuda-nvcc nvidia-cuda-crt nvidia-nvvm "
                    "nvidia-cuda-runtime nvidia-cuda-cccl nvidia-cublas`")
endif()

execute_process(COMMAND "${LLAMAMEM_NVCC}" --list-gpu-arch
    OUTPUT_VARIABLE LLAMAMEM_NVCC_ARCHS ERROR_VARIABLE LLAMAMEM_NVCC_ERROR RESULT_VARIABLE LLAMAMEM_NVCC_RESULT)
string(REGEX MATCHALL "compute_[0-9]+[a-z]?" LLAMAMEM_NVCC_ARCHS "${LLAMAMEM_NVCC_ARCHS}")
list(TRANSFORM LLAMAMEM_NVCC_ARCHS REPLACE "compute_" "")
if (NOT LLAMAMEM_NVCC_RESULT EQUAL 0 OR NOT LLAMAMEM_NVCC_ARCHS)
    llamamem_refuse("CUDA: ${LLAMAMEM_NVCC} does not run (${LLAMAMEM_NVCC_RESULT}): reinstall the CUDA toolkit")
endif()
list(JOIN LLAMAMEM_NVCC_ARCHS " " LLAMAMEM_NVCC_ARCHS_TEXT)

#
# architectures: those named, else those of the GPUs here, else a small set of which the newest also goes into later GPUs
#

execute_process(COMMAND nvidia-smi --query-gpu=compute_cap,driver_version --format=csv,noheader
    OUTPUT_VARIABLE LLAMAMEM_SMI ERROR_QUIET RESULT_VARIABLE LLAMAMEM_SMI_RESULT)
string(REGEX MATCHALL "[0-9]+\\.[0-9]+," LLAMAMEM_GPUS "${LLAMAMEM_SMI}")
list(TRANSFORM LLAMAMEM_GPUS REPLACE "[.,]" "")
list(REMOVE_DUPLICATES LLAMAMEM_GPUS)
set(LLAMAMEM_DRIVER "none")
if (LLAMAMEM_SMI_RESULT EQUAL 0 AND LLAMAMEM_SMI MATCHES ", ([0-9.]+)")
    set(LLAMAMEM_DRIVER "${CMAKE_MATCH_1}")
endif()

set(LLAMAMEM_ARCHS "${LLAMAMEM_CUDA_ARCH}")
if (LLAMAMEM_ARCHS STREQUAL "native" AND NOT LLAMAMEM_GPUS)
    llamamem_refuse("CUDA: --arch native: nvidia-smi shows no GPU here: name the architecture, as in --arch 90")
elseif (NOT LLAMAMEM_ARCHS OR LLAMAMEM_ARCHS STREQUAL "native")
    set(LLAMAMEM_ARCHS ${LLAMAMEM_GPUS})
endif()
if (NOT LLAMAMEM_ARCHS)
    set(LLAMAMEM_ARCHS 80-real 90)
endif()
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

#
# runtime and cuBLAS
#

# The wheels have libcublas.so.13 and no libcublas.so, which is what CMake looks for.
file(MAKE_DIRECTORY "${CMAKE_BINARY_DIR}/cuda-lib")
foreach (NAME cudart cublas cublasLt)
    set(LLAMAMEM_FOUND)
    foreach (ROOT IN LISTS LLAMAMEM_CUDA_ROOTS)
        file(GLOB FOUND "${ROOT}/lib64/lib${NAME}.so*" "${ROOT}/lib/lib${NAME}.so*")
        list(APPEND LLAMAMEM_FOUND ${FOUND})
    endforeach()
    if (LLAMAMEM_FOUND)
        list(GET LLAMAMEM_FOUND 0 FOUND)
        file(CREATE_LINK "${FOUND}" "${CMAKE_BINARY_DIR}/cuda-lib/lib${NAME}.so" SYMBOLIC)
        get_filename_component(FOUND "${FOUND}" DIRECTORY)
        list(APPEND LLAMAMEM_CUDA_LIBRARY_DIRS "${FOUND}")
    endif()
endforeach()
list(APPEND CMAKE_LIBRARY_PATH "${CMAKE_BINARY_DIR}/cuda-lib")

find_package(CUDAToolkit QUIET)
if (NOT CUDAToolkit_FOUND OR NOT TARGET CUDA::cudart)
    llamamem_refuse("CUDA: ${LLAMAMEM_NVCC} is there, but the CUDA runtime (cuda_runtime.h, libcudart) is not: "
                    "install the toolkit's cudart development package, or `pip install nvidia-cuda-runtime`")
endif()
set(LLAMAMEM_CUBLAS_HINTS ${LLAMAMEM_CUDA_ROOTS})
list(TRANSFORM LLAMAMEM_CUBLAS_HINTS APPEND "/include")
find_path(LLAMAMEM_CUBLAS_INCLUDE cublas_v2.h HINTS ${CUDAToolkit_INCLUDE_DIRS} ${LLAMAMEM_CUBLAS_HINTS})
if (NOT TARGET CUDA::cublas OR NOT LLAMAMEM_CUBLAS_INCLUDE)
    llamamem_refuse("CUDA: cuBLAS (cublas_v2.h, libcublas) was not found for the toolkit "
                    "${CUDAToolkit_VERSION} of ${LLAMAMEM_NVCC}: install its cuBLAS development package, or `pip install nvidia-cublas`")
endif()
target_include_directories(CUDA::cublas INTERFACE "${LLAMAMEM_CUBLAS_INCLUDE}")

# Where the toolkit has no libcuda to link with, the memory pool does without the driver's virtual addresses.
if (NOT TARGET CUDA::cuda_driver)
    set(GGML_CUDA_NO_VMM ON CACHE BOOL "" FORCE)
endif()

#
# host compiler
#

file(WRITE "${CMAKE_BINARY_DIR}/cuda-probe/probe.cu" "#include <cuda_runtime.h>\n#include <optional>\n__global__ void probe() {}\n")
set(LLAMAMEM_CUDA_HOST "$ENV{CUDAHOSTCXX}")
if (NOT LLAMAMEM_CUDA_HOST)
    set(LLAMAMEM_CUDA_HOST "${CMAKE_CXX_COMPILER}")
endif()
list(TRANSFORM CUDAToolkit_INCLUDE_DIRS PREPEND "-I" OUTPUT_VARIABLE LLAMAMEM_CUDA_INCLUDES)
execute_process(
    COMMAND "${LLAMAMEM_NVCC}" -std=c++17 -ccbin "${LLAMAMEM_CUDA_HOST}" ${LLAMAMEM_CUDA_INCLUDES} -c probe.cu -o probe.o
    WORKING_DIRECTORY "${CMAKE_BINARY_DIR}/cuda-probe"
    OUTPUT_VARIABLE LLAMAMEM_PROBE ERROR_VARIABLE LLAMAMEM_PROBE RESULT_VARIABLE LLAMAMEM_PROBE_RESULT)
if (NOT LLAMAMEM_PROBE_RESULT EQUAL 0)
    string(REGEX MATCH "[^\n]*error[^\n]*" LLAMAMEM_PROBE_ERROR "${LLAMAMEM_PROBE}")
    llamamem_refuse("CUDA: ${LLAMAMEM_NVCC} does not compile with ${LLAMAMEM_CUDA_HOST} (${CMAKE_CXX_COMPILER_ID} "
                    "${CMAKE_CXX_COMPILER_VERSION}): ${LLAMAMEM_PROBE_ERROR}: set CUDAHOSTCXX to a g++ that this toolkit takes")
endif()

set(CMAKE_CUDA_COMPILER      "${LLAMAMEM_NVCC}"      CACHE FILEPATH "" FORCE)
set(CMAKE_CUDA_HOST_COMPILER "${LLAMAMEM_CUDA_HOST}" CACHE FILEPATH "" FORCE)
set(CMAKE_CUDA_ARCHITECTURES "${LLAMAMEM_ARCHS}"     CACHE STRING   "" FORCE)

list(JOIN LLAMAMEM_ARCHS " " LLAMAMEM_ARCHS_TEXT)
file(WRITE "${CMAKE_BINARY_DIR}/llamamem-cuda.txt"
    "CUDA ${CUDAToolkit_VERSION} (${LLAMAMEM_NVCC}), cuBLAS of ${LLAMAMEM_CUBLAS_INCLUDE}, driver ${LLAMAMEM_DRIVER}, architectures ${LLAMAMEM_ARCHS_TEXT}\n")
