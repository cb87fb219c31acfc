/* Preloaded into a command: the clock of the day is MOVING_CLOCK's eight bytes, a number of seconds,
   ahead of the system's; all processes see them change at once. Clocks that count from the system's
   start go on, as they do when somebody sets the clock. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static _Atomic long *ahead;

__attribute__((constructor)) static void begin(void) {
    const char *file = getenv("MOVING_CLOCK");
    if (!file) return;
    int descriptor = open(file, O_RDONLY | O_CLOEXEC);
    void *shared = mmap(NULL, 8, PROT_READ, MAP_SHARED, descriptor, 0);
    if (shared != MAP_FAILED) ahead = shared;
    close(descriptor);
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    int failed = syscall(SYS_clock_gettime, clock, now);
    if (!failed && ahead && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
        now->tv_sec += atomic_load(ahead);
    return failed;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    (void)zone;
    struct timespec exact;
    int failed = clock_gettime(CLOCK_REALTIME, &exact);
    now->tv_sec = exact.tv_sec;
    now->tv_usec = exact.tv_nsec / 1000;
    return failed;
}

time_t time(time_t *now) {
    struct timespec exact;
    clock_gettime(CLOCK_REALTIME, &exact);
    if (now) *now = exact.tv_sec;
    return exact.tv_sec;
}
