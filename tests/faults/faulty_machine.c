/* A machine whose disk fails, or whose clock is off: LD_PRELOAD it.
 *
 * FAULTY_CLOCK_S: seconds that the clock is ahead. FAULTY_FOLDER: calls on files below it fail as the others say.
 * FAULTY_CALL: write, fsync or close. FAULTY_ERRNO: what they fail with. FAULTY_TIMES: how many do, then all succeed.
 * A write fails after half of its bytes, as on a disk that is full. A copy within the kernel falls back to write.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

static atomic_int failed;

static int fails(const char *call, int fd) {
    const char *folder = getenv("FAULTY_FOLDER"), *which = getenv("FAULTY_CALL");
    char link[64], path[4096];
    if (!folder || !which || strcmp(which, call)) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size < 0) return 0;
    path[size] = 0;
    if (strncmp(path, folder, strlen(folder))) return 0;
    if (atomic_fetch_add(&failed, 1) >= atoi(getenv("FAULTY_TIMES"))) return 0;
    errno = atoi(getenv("FAULTY_ERRNO"));
    return 1;
}

ssize_t write(int fd, const void *data, size_t size) {
    ssize_t (*real)(int, const void *, size_t) = dlsym(RTLD_NEXT, "write");
    if (!fails("write", fd)) return real(fd, data, size);
    int error = errno;
    real(fd, data, size / 2);
    errno = error;
    return -1;
}

int fsync(int fd) {
    int (*real)(int) = dlsym(RTLD_NEXT, "fsync");
    return fails("fsync", fd) ? -1 : real(fd);
}

int close(int fd) {
    int (*real)(int) = dlsym(RTLD_NEXT, "close");
    int is_failed = fails("close", fd), error = errno;
    int result = real(fd);
    if (!is_failed) return result;
    errno = error;
    return -1;
}

ssize_t sendfile64(int out, int in, off_t *offset, size_t size) {
    errno = ENOSYS;
    return -1;
}

ssize_t sendfile(int out, int in, off_t *offset, size_t size) {
    errno = ENOSYS;
    return -1;
}

ssize_t copy_file_range(int in, off_t *in_at, int out, off_t *out_at, size_t size, unsigned flags) {
    errno = ENOSYS;
    return -1;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    int (*real)(clockid_t, struct timespec *) = dlsym(RTLD_NEXT, "clock_gettime");
    const char *ahead = getenv("FAULTY_CLOCK_S");
    int result = real(clock, now);
    if (ahead && clock == CLOCK_REALTIME) now->tv_sec += atoi(ahead);
    return result;
}
