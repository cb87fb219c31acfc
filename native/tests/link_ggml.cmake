# Let <TO> hold a link to every ggml library in <FROM>: the unpatched libllama then finds, in its own
# folder, the very files that the patched one uses.
file(GLOB LIBRARIES RELATIVE "${FROM}" "${FROM}/libggml*")
file(RELATIVE_PATH UP "${TO}" "${FROM}")
foreach(LIBRARY IN LISTS LIBRARIES)
    file(CREATE_LINK "${UP}/${LIBRARY}" "${TO}/${LIBRARY}" SYMBOLIC)
endforeach()
