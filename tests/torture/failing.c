/* Preloaded into a command: the N-th of its calls that change files below a folder fails.

   Environment: FAILING_FOLDER; FAILING_COUNTER, a file of eight zero bytes in which all processes
   count together; FAILING_CALL, the number of the call; FAILING_ERRNO; FAILING_ON, if not empty, for
   all later calls as well, but those that free room. What failed is appended to FAILING_COUNTER.what. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static _Atomic long *counter;
static const char *folder;
static size_t length;
static long chosen;
static int code, lasting;

__attribute__((constructor)) static void begin(void) {
    folder = getenv("FAILING_FOLDER");
    const char *file = getenv("FAILING_COUNTER");
    if (!folder || !file) return;
    length = strlen(folder);
    chosen = atol(getenv("FAILING_CALL"));
    code = atoi(getenv("FAILING_ERRNO"));
    const char *on = getenv("FAILING_ON");
    lasting = on && *on;
    int descriptor = syscall(SYS_openat, AT_FDCWD, file, O_RDWR);
    void *shared = mmap(NULL, 8, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0);
    if (shared != MAP_FAILED) counter = shared;
    syscall(SYS_close, descriptor);
}

/* Whether this call, of a file at `path`, is to fail; errno is set then. */
static int fails(const char *call, const char *path) {
    if (!counter || !path || strncmp(path, folder, length)) return 0;
    long number = 1 + atomic_fetch_add(counter, 1);
    if (number != chosen && !(lasting && number > chosen)) return 0;
    if (number == chosen) {
        char what[PATH_MAX + 64], file[PATH_MAX];
        snprintf(file, sizeof file, "%s.what", getenv("FAILING_COUNTER"));
        int size = snprintf(what, sizeof what, "%s %s\n", call, path + length);
        int descriptor = syscall(SYS_openat, AT_FDCWD, file, O_WRONLY | O_CREAT | O_APPEND, 0644);
        syscall(SYS_write, descriptor, what, size);
        syscall(SYS_close, descriptor);
    }
    errno = code;
    return 1;
}

static int fails_there(const char *call, int at, const char *path) {
    char whole[PATH_MAX], link[64];
    if (!counter || !path) return 0;
    if (*path == '/') return fails(call, path);
    if (at == AT_FDCWD) {
        if (!getcwd(whole, sizeof whole)) return 0;
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", at);
        ssize_t size = readlink(link, whole, sizeof whole - 1);
        if (size < 0) return 0;
        whole[size] = 0;
    }
    size_t size = strlen(whole);
    snprintf(whole + size, sizeof whole - size, "/%s", path);
    return fails(call, whole);
}

static int fails_of(const char *call, int descriptor) {
    char link[64], path[PATH_MAX];
    if (!counter) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size < 0) return 0;
    path[size] = 0;
    return fails(call, path);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define CHANGES(flags) ((flags) & (O_CREAT | O_WRONLY | O_RDWR | O_TRUNC))
#define OPEN(name)                                                              \
    int name(const char *path, int flags, ...) {                                \
        va_list rest;                                                           \
        va_start(rest, flags);                                                  \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest);                                                           \
        if (CHANGES(flags) && fails_there("open", AT_FDCWD, path)) return -1;   \
        return REAL(name)(path, flags, mode);                                   \
    }
#define OPENAT(name)                                                            \
    int name(int at, const char *path, int flags, ...) {                        \
        va_list rest;                                                           \
        va_start(rest, flags);                                                  \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest);                                                           \
        if (CHANGES(flags) && fails_there("open", at, path)) return -1;         \
        return REAL(name)(at, path, flags, mode);                               \
    }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

FILE *fopen(const char *path, const char *mode) {
    if (strpbrk(mode, "wa+") && fails_there("open", AT_FDCWD, path)) return NULL;
    return REAL(fopen)(path, mode);
}
FILE *fopen64(const char *path, const char *mode) {
    if (strpbrk(mode, "wa+") && fails_there("open", AT_FDCWD, path)) return NULL;
    return REAL(fopen64)(path, mode);
}
ssize_t write(int descriptor, const void *data, size_t size) {
    return fails_of("write", descriptor) ? -1 : REAL(write)(descriptor, data, size);
}
ssize_t pwrite64(int descriptor, const void *data, size_t size, off64_t at) {
    return fails_of("write", descriptor) ? -1 : REAL(pwrite64)(descriptor, data, size, at);
}
ssize_t writev(int descriptor, const struct iovec *data, int count) {
    return fails_of("write", descriptor) ? -1 : REAL(writev)(descriptor, data, count);
}
int fsync(int descriptor) { return fails_of("fsync", descriptor) ? -1 : REAL(fsync)(descriptor); }
int rename(const char *from, const char *to) {
    return fails_there("rename", AT_FDCWD, to) ? -1 : REAL(rename)(from, to);
}
int renameat(int at, const char *from, int there, const char *to) {
    return fails_there("rename", there, to) ? -1 : REAL(renameat)(at, from, there, to);
}
int mkdir(const char *path, mode_t mode) {
    return fails_there("mkdir", AT_FDCWD, path) ? -1 : REAL(mkdir)(path, mode);
}
