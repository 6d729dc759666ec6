# Fuzzing the sidecar loader: tools/fuzz.py configures a build tree of its own with this and runs what it gives.

option(LLAMAMEM_FUZZ_COVERAGE "llamamem: instrument for a report of line coverage instead of for fuzzing" OFF)

set(BUILD_SHARED_LIBS OFF CACHE BOOL "" FORCE)

# The loader lets a wrong hash pass with this macro: no mutation would be read beyond one otherwise.
add_compile_definitions(FUZZING_BUILD_MODE_UNSAFE_FOR_PRODUCTION)
add_compile_options(-g -fno-omit-frame-pointer)

if (LLAMAMEM_FUZZ_COVERAGE)
    add_compile_options(-O0 -fprofile-instr-generate -fcoverage-mapping)
    add_link_options(-fprofile-instr-generate)
else()
    add_compile_options(-O1 -fsanitize=fuzzer-no-link,address,undefined -fno-sanitize-recover=all)
    add_link_options(-fsanitize=address,undefined)
endif()

function(llamamem_fuzz_targets)
    set(SRC "${CMAKE_SOURCE_DIR}/patches/src")
    add_executable(fuzz-adapter-mem-sidecar
        "${CMAKE_SOURCE_DIR}/tests/fuzz/fuzz-adapter-mem-sidecar.cpp"
        "${SRC}/llama-adapter-mem-config.cpp"
        "${SRC}/llama-adapter-mem-gguf.cpp"
        "${SRC}/llama-adapter-mem-sha256.cpp"
        "${SRC}/llama-adapter-mem-sidecar.cpp"
        "${SRC}/llama-adapter-mem-sidecar-keys.cpp"
        "${SRC}/llama-adapter-mem-sidecar-kv.cpp"
        "${SRC}/llama-adapter-mem-sidecar-tensors.cpp")
    set_target_properties(fuzz-adapter-mem-sidecar PROPERTIES RUNTIME_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}")
    target_compile_features(fuzz-adapter-mem-sidecar PRIVATE cxx_std_17)
    target_compile_options(fuzz-adapter-mem-sidecar PRIVATE -UNDEBUG -Wall -Wextra)
    target_include_directories(fuzz-adapter-mem-sidecar PRIVATE "${SRC}" "${LLAMAMEM_TREE}/src" "${LLAMAMEM_TREE}/vendor")
    target_link_libraries(fuzz-adapter-mem-sidecar PRIVATE ggml-base)
    target_link_options(fuzz-adapter-mem-sidecar PRIVATE -fsanitize=fuzzer)
    add_custom_target(llamamem-fuzz ALL DEPENDS fuzz-adapter-mem-sidecar)
endfunction()
