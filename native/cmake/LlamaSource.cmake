# Where the llama.cpp sources come from, and how they are kept honest.
#
# The sdist of llama-cpp-python carries the llama.cpp tree that its bindings were written for.
# Taking the sources from there, and nowhere else, makes "library and bindings are one version"
# true by construction. Nothing here needs a compiler, so bad input is reported within a second.

# The one sdist this project is built from: the one whose bindings are installed.
set(LLAMA_LOCK "${CMAKE_CURRENT_LIST_DIR}/../../requirements.lock")
file(READ "${LLAMA_LOCK}" LOCKED)
if(NOT LOCKED MATCHES "\nllama-cpp-python==([0-9.]+) \\\\\n +--hash=sha256:([0-9a-f]+)\n")
    message(FATAL_ERROR "${LLAMA_LOCK} names no llama-cpp-python with one hash: write it with 'make lock'.")
endif()
set(LLAMA_SDIST_VERSION "${CMAKE_MATCH_1}")
set(LLAMA_SDIST_SHA256 "${CMAKE_MATCH_2}")

set(LLAMA_SDIST_HOW "Get it with\n\
  pip download --no-deps --no-binary :all: llama-cpp-python==${LLAMA_SDIST_VERSION}\n\
and pass the file: cmake -S native -B build/native -DLLAMA_SDIST=llama_cpp_python-${LLAMA_SDIST_VERSION}.tar.gz\n\
('make setup' does both.)")

# Parts of the tree that the libraries and the converters need (the whole is 176 MB, mostly vocabularies).
set(LLAMA_TREE_MEMBERS
    CMakeLists.txt LICENSE AUTHORS cmake include src ggml vendor          # build
    convert_hf_to_gguf.py convert_lora_to_gguf.py conversion gguf-py      # convert
    models/ggml-vocab-gpt-2.gguf)                                         # GPT-2's tokenizer

# llama_sdist_verify(<file>): stop unless the file is exactly the expected one.
function(llama_sdist_verify SDIST)
    if(NOT SDIST)
        message(FATAL_ERROR "LLAMA_SDIST is not set: it must name the source package of llama-cpp-python "
                            "${LLAMA_SDIST_VERSION}.\n${LLAMA_SDIST_HOW}")
    endif()
    if(NOT EXISTS "${SDIST}" OR IS_DIRECTORY "${SDIST}")
        message(FATAL_ERROR "LLAMA_SDIST: there is no file '${SDIST}'.\n${LLAMA_SDIST_HOW}")
    endif()
    file(SHA256 "${SDIST}" ACTUAL)
    if(NOT ACTUAL STREQUAL LLAMA_SDIST_SHA256)
        message(FATAL_ERROR "LLAMA_SDIST: '${SDIST}' is not the expected file.\n"
            "  sha256 expected: ${LLAMA_SDIST_SHA256}\n"
            "  sha256 found:    ${ACTUAL}\n"
            "Delete it (an interrupted download looks like this) and fetch it again. ${LLAMA_SDIST_HOW}")
    endif()
endfunction()

# llama_tree(<sdist> <dir> MEMBERS <paths...> [PATCHES <files...>])
#
# Make <dir> the given parts of the llama.cpp tree with the patches applied, in order. Does nothing
# if it already is: a stamp in <dir> records the hashes of everything that went into it. Otherwise
# the tree is unpacked and patched beside <dir> and moved there when complete, so that <dir> is
# never half patched and no patch is ever applied twice.
function(llama_tree SDIST DIR)
    cmake_parse_arguments(PARSE_ARGV 2 ARG "" "" "MEMBERS;PATCHES")

    set(STAMP "${LLAMA_SDIST_SHA256}\n${ARG_MEMBERS}\n")
    set(TOUCHED "")
    foreach(PATCH IN LISTS ARG_PATCHES)
        file(SHA256 "${PATCH}" HASH)
        get_filename_component(NAME "${PATCH}" NAME)
        string(APPEND STAMP "${HASH} ${NAME}\n")
        file(STRINGS "${PATCH}" LINES REGEX "^\\+\\+\\+ b/")
        list(APPEND TOUCHED ${LINES})
    endforeach()
    list(TRANSFORM TOUCHED REPLACE "^\\+\\+\\+ b/" "")

    set(OLD_STAMP "")
    if(EXISTS "${DIR}/.stamp")
        file(READ "${DIR}/.stamp" OLD_STAMP)
    endif()
    if(OLD_STAMP STREQUAL STAMP)
        return()
    endif()

    llama_sdist_verify("${SDIST}")
    get_filename_component(NAME "${DIR}" NAME)
    message(STATUS "Unpacking llama.cpp of llama-cpp-python ${LLAMA_SDIST_VERSION} into ${NAME}/")
    set(ROOT "llama_cpp_python-${LLAMA_SDIST_VERSION}/vendor/llama.cpp")
    list(TRANSFORM ARG_MEMBERS PREPEND "${ROOT}/")
    set(WORK "${DIR}.unpack")
    file(REMOVE_RECURSE "${WORK}")
    file(ARCHIVE_EXTRACT INPUT "${SDIST}" DESTINATION "${WORK}" PATTERNS ${ARG_MEMBERS})

    if(ARG_PATCHES)
        find_program(LLAMA_GIT git)
        if(NOT LLAMA_GIT)
            message(FATAL_ERROR "git is needed to apply native/patches. Install it "
                                "(Debian/Ubuntu: apt install git, conda: conda install git).")
        endif()
    endif()
    foreach(PATCH IN LISTS ARG_PATCHES)
        # git apply is strict (no fuzz). But if it finds itself inside a repository, and build/ is
        # inside one, it skips files that the repository does not know, without a word: hide it.
        get_filename_component(PATCH_NAME "${PATCH}" NAME)
        message(STATUS "Applying ${PATCH_NAME}")
        execute_process(
            COMMAND "${CMAKE_COMMAND}" -E env --unset=GIT_DIR --unset=GIT_WORK_TREE "GIT_CEILING_DIRECTORIES=${WORK}"
                    "${LLAMA_GIT}" apply --whitespace=nowarn "${PATCH}"
            WORKING_DIRECTORY "${WORK}/${ROOT}" RESULT_VARIABLE FAILED ERROR_VARIABLE ERROR)
        if(FAILED)
            message(FATAL_ERROR "native/patches/${PATCH_NAME} does not apply to llama.cpp of llama-cpp-python "
                "${LLAMA_SDIST_VERSION}:\n${ERROR}See native/README.md, 'Rebasing the patches'.")
        endif()
    endforeach()

    # Unpacked files keep the dates of the archive, so that what did not change is not compiled
    # again. A file that an *earlier* patch had changed would then look older than its object:
    # date such files, and those patched now, today.
    set(OLD_TOUCHED "")
    if(EXISTS "${DIR}/.touched")
        file(STRINGS "${DIR}/.touched" OLD_TOUCHED)
    endif()
    foreach(FILE IN LISTS TOUCHED OLD_TOUCHED)
        file(TOUCH_NOCREATE "${WORK}/${ROOT}/${FILE}")
    endforeach()
    string(REPLACE ";" "\n" TOUCHED "${TOUCHED}")
    file(WRITE "${WORK}/${ROOT}/.touched" "${TOUCHED}\n")

    file(REMOVE_RECURSE "${DIR}")
    file(RENAME "${WORK}/${ROOT}" "${DIR}")
    file(REMOVE_RECURSE "${WORK}")
    file(WRITE "${DIR}/.stamp" "${STAMP}") # last: without it the next run starts over
endfunction()
