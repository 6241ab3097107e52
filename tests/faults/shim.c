/* Fails or kills at the k-th operation on the files below a folder; see inject.py.

   LD_PRELOAD puts these functions before those of the C library, for Python and for the C++ of its extensions. Nothing
   happens before faults_arm is called. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OPEN, WRITE, FSYNC, RENAME, UNLINK, MKDIR, TRUNCATE, OPERATIONS };
static const char *names[] = {"open", "write", "fsync", "rename", "unlink", "mkdir", "truncate"};

static char folder[4096];
static int armed_operation = -1, armed_call, armed_error, log_file = -1; /* an error of 0 kills */
static atomic_int calls[OPERATIONS], full;

void faults_arm(const char *below, int operation, int call, int error, int log) {
    strncpy(folder, below, sizeof folder - 1);
    armed_operation = operation, armed_call = call, armed_error = error, log_file = log;
}

static void tell(const char *what, const char *path, long number) {
    char line[9000];
    int length = snprintf(line, sizeof line, "%s\t%ld\t%s\n", what, number, path);
    if (log_file >= 0) syscall(SYS_write, log_file, line, length);
}

static const char *path_of(int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, path, 4095);
    path[length < 0 ? 0 : length] = 0;
    return path;
}

static const char *path_at(int fd, const char *name, char *path) {
    if (name[0] == '/') return strncpy(path, name, 4095);
    if (fd != AT_FDCWD) path_of(fd, path);
    else if (syscall(SYS_getcwd, path, 4095) < 0) path[0] = 0;
    size_t length = strlen(path);
    snprintf(path + length, 8190 - length, "/%s", name);
    return path;
}

/* Returns the errno to fail with, 0 to go on, or -1 for a write that ends in the middle. */
static int fault(int operation, const char *path) {
    size_t length = strlen(folder);
    if (!length || strncmp(path, folder, length) || (path[length] && path[length] != '/')) return 0;
    int call = ++calls[operation];
    tell(names[operation], path, call);
    if (operation == armed_operation && call == armed_call) {
        tell("fault", path, call);
        if (operation == WRITE && armed_error != EIO) return -1;
        if (!armed_error) kill(getpid(), SIGKILL);
        full = armed_error == ENOSPC;
        return armed_error;
    }
    return full && (operation == WRITE || operation == MKDIR) ? ENOSPC : 0; /* a disk that is full stays full */
}

#define REAL(name, type, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = (type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)
#define CHECK(operation, path) \
    do { \
        int error = fault(operation, path); \
        if (error) return errno = error, -1; \
    } while (0)

static ssize_t ended(ssize_t written) {
    if (!armed_error) kill(getpid(), SIGKILL);
    full = 1;
    return written > 0 ? written : (errno = ENOSPC, -1);
}

ssize_t write(int fd, const void *data, size_t size) {
    REAL("write", ssize_t, int, const void *, size_t);
    char path[8192];
    int error = folder[0] ? fault(WRITE, path_of(fd, path)) : 0;
    if (error > 0) return errno = error, -1;
    return error ? ended(real(fd, data, size / 2)) : real(fd, data, size);
}

static ssize_t pwrite_(const char *name, int fd, const void *data, size_t size, off_t offset) {
    ssize_t (*real)(int, const void *, size_t, off_t) = dlsym(RTLD_NEXT, name);
    char path[8192];
    int error = folder[0] ? fault(WRITE, path_of(fd, path)) : 0;
    if (error > 0) return errno = error, -1;
    return error ? ended(real(fd, data, size / 2, offset)) : real(fd, data, size, offset);
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) { return pwrite_("pwrite", fd, data, size, offset); }
ssize_t pwrite64(int fd, const void *data, size_t size, off_t offset) { return pwrite_("pwrite64", fd, data, size, offset); }

ssize_t writev(int fd, const struct iovec *parts, int number) {
    REAL("writev", ssize_t, int, const struct iovec *, int);
    char path[8192];
    int error = folder[0] ? fault(WRITE, path_of(fd, path)) : 0;
    if (error > 0) return errno = error, -1;
    return error ? ended(real(fd, parts, number / 2)) : real(fd, parts, number);
}

static int opened(const char *name, int fd, const char *path, int flags, mode_t mode) {
    char whole[8192];
    int (*real)(int, const char *, int, ...) = dlsym(RTLD_NEXT, name);
    if (folder[0] && (flags & (O_WRONLY | O_RDWR | O_CREAT))) CHECK(OPEN, path_at(fd, path, whole));
    return real(fd, path, flags, mode);
}
#define MODE \
    va_list rest; \
    va_start(rest, flags); \
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
    va_end(rest)
int open(const char *path, int flags, ...) { MODE; return opened("openat", AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE; return opened("openat64", AT_FDCWD, path, flags, mode); }
int openat(int fd, const char *path, int flags, ...) { MODE; return opened("openat", fd, path, flags, mode); }
int openat64(int fd, const char *path, int flags, ...) { MODE; return opened("openat64", fd, path, flags, mode); }

static int synced(const char *name, int fd) {
    int (*real)(int) = dlsym(RTLD_NEXT, name);
    char path[8192];
    if (!folder[0]) return real(fd);
    CHECK(FSYNC, path_of(fd, path));
    int result = real(fd);
    struct stat about;
    if (!result && !fstat(fd, &about)) tell("safe", path, about.st_size);
    return result;
}
int fsync(int fd) { return synced("fsync", fd); }
int fdatasync(int fd) { return synced("fdatasync", fd); }

int renameat2(int from_fd, const char *from, int to_fd, const char *to, unsigned flags) {
    char path[8192];
    if (folder[0]) CHECK(RENAME, path_at(to_fd, to, path));
    int result = syscall(SYS_renameat2, from_fd, from, to_fd, to, flags);
    if (folder[0] && !result) tell("named", path_at(to_fd, to, path), 0);
    return result;
}
int rename(const char *from, const char *to) { return renameat2(AT_FDCWD, from, AT_FDCWD, to, 0); }
int renameat(int from_fd, const char *from, int to_fd, const char *to) { return renameat2(from_fd, from, to_fd, to, 0); }

int unlinkat(int fd, const char *path, int flags) {
    char whole[8192];
    if (folder[0]) CHECK(UNLINK, path_at(fd, path, whole));
    return syscall(SYS_unlinkat, fd, path, flags);
}
int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }

int mkdirat(int fd, const char *path, mode_t mode) {
    char whole[8192];
    if (folder[0]) CHECK(MKDIR, path_at(fd, path, whole));
    return syscall(SYS_mkdirat, fd, path, mode);
}
int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }

int ftruncate(int fd, off_t size) {
    char path[8192];
    if (folder[0]) CHECK(TRUNCATE, path_of(fd, path));
    return syscall(SYS_ftruncate, fd, size);
}
int ftruncate64(int fd, off_t size) { return ftruncate(fd, size); }
