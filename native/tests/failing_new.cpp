// operator new that fails on demand. In a file of its own, because a compiler that sees both new and
// free() in one place takes them for a mistake.

#include <cstdint>
#include <cstdlib>
#include <new>

thread_local int64_t allocations_left = -1; // of this thread; < 0: all succeed

void * operator new(size_t size) {
    if (allocations_left == 0) {
        throw std::bad_alloc();
    }
    if (allocations_left > 0) {
        allocations_left--;
    }
    void * p = std::malloc(size ? size : 1);
    if (!p) {
        throw std::bad_alloc();
    }
    return p;
}

void * operator new[](size_t size) { return operator new(size); }
void   operator delete  (void * p) noexcept { std::free(p); }
void   operator delete[](void * p) noexcept { std::free(p); }
void   operator delete  (void * p, size_t) noexcept { std::free(p); }
void   operator delete[](void * p, size_t) noexcept { std::free(p); }
