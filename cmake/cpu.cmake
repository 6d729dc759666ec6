# What the compiler makes of this CPU: AMX is left out where its code does not work, and the features that the binaries
# need are written down beside them, so that another machine can refuse them by name.

set(LLAMAMEM_AMX_PROBE "${CMAKE_CURRENT_LIST_DIR}/amx-probe.cpp" CACHE FILEPATH "llamamem: the program that tries AMX")
mark_as_advanced(LLAMAMEM_AMX_PROBE)
set(LLAMAMEM_NO_AMX -mno-amx-tile -mno-amx-int8 -mno-amx-bf16)

# Before the tree is added: sets LLAMAMEM_AMX to what became of AMX, empty where nobody asked for it.
# `-march=native` alone is probed; who names AMX with GGML_AMX_INT8 may be building for another machine.
function(llamamem_try_amx)
    set(LLAMAMEM_AMX "" PARENT_SCOPE)
    if (DEFINED GGML_NATIVE AND NOT GGML_NATIVE)
        return()
    endif()
    include(CheckCXXSourceCompiles)
    set(CMAKE_REQUIRED_FLAGS "-march=native")
    check_cxx_source_compiles("#ifndef __AMX_INT8__\n#error\n#endif\nint main() { return 0; }" LLAMAMEM_NATIVE_HAS_AMX)
    if (NOT LLAMAMEM_NATIVE_HAS_AMX)
        return()
    endif()

    # the code itself, not a copy of it: without its patch the probe fails as the runtime would
    file(READ "${LLAMAMEM_TREE}/ggml/src/ggml-cpu/amx/mmq.cpp" TEXT)
    string(FIND "${TEXT}" "struct tile_config_t" BEGIN)
    string(FIND "${TEXT}" "// we need an extra 16 * 4B" END)
    math(EXPR LENGTH "${END} - ${BEGIN}")
    if (BEGIN LESS 0 OR LENGTH LESS 1)
        set(WHY "cmake/cpu.cmake does not find the tile configuration in mmq.cpp")
    else()
        string(SUBSTRING "${TEXT}" ${BEGIN} ${LENGTH} TEXT)
        file(WRITE "${CMAKE_BINARY_DIR}/llamamem-amx/llamamem-amx-config.h" "${TEXT}")
        string(TOUPPER "${CMAKE_BUILD_TYPE}" TYPE)
        separate_arguments(FLAGS UNIX_COMMAND "${CMAKE_CXX_FLAGS_${TYPE}}")
        unset(RAN CACHE) # a changed tree or compiler is another answer
        try_run(RAN COMPILED "${CMAKE_BINARY_DIR}/llamamem-amx" "${LLAMAMEM_AMX_PROBE}"
            CMAKE_FLAGS "-DINCLUDE_DIRECTORIES=${CMAKE_BINARY_DIR}/llamamem-amx"
            COMPILE_DEFINITIONS ${FLAGS} -march=native -std=c++17
            RUN_OUTPUT_VARIABLE OUTPUT)
        if (NOT COMPILED)
            set(WHY "the compiler does not take its intrinsics")
        elseif ("${RAN}" STREQUAL "0")
            set(LLAMAMEM_AMX "used" PARENT_SCOPE)
            return()
        elseif ("${RAN}" STREQUAL "1")
            set(WHY "a product of two tiles is wrong")
        elseif ("${RAN}" STREQUAL "2")
            set(WHY "the kernel does not permit it")
        else()
            set(WHY "the compiler's code crashes on this CPU")
        endif()
    endif()
    set(LLAMAMEM_AMX "left out: ${WHY}" PARENT_SCOPE)
    # beats -march=native wherever it stands on the command line
    foreach (FLAG IN LISTS LLAMAMEM_NO_AMX)
        add_compile_options("$<$<COMPILE_LANGUAGE:C,CXX>:${FLAG}>")
    endforeach()
endfunction()

# After the tree was added: the record, beside the binaries and wherever they are copied to.
function(llamamem_record_cpu)
    get_target_property(FLAGS ggml-cpu COMPILE_OPTIONS)
    list(FILTER FLAGS INCLUDE REGEX "^-m[^;]*$")
    if (LLAMAMEM_AMX MATCHES "^left out")
        list(APPEND FLAGS ${LLAMAMEM_NO_AMX})
    endif()
    separate_arguments(GIVEN UNIX_COMMAND "${CMAKE_CXX_FLAGS}")
    execute_process(
        COMMAND ${LLAMAMEM_PYTHON} llamamem.native.cpu "${CMAKE_BINARY_DIR}/bin" "${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}"
                "${LLAMAMEM_AMX}" -- "${CMAKE_CXX_COMPILER}" ${GIVEN} ${FLAGS}
        COMMAND_ERROR_IS_FATAL ANY)
endfunction()
