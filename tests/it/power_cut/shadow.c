/* What the disk is bound to have after a power cut, kept beside the files of a running process.
 *
 * Loaded with LD_PRELOAD. It follows fsync and fdatasync of what is below the folder $COEL_POWER_CUT_DATA. Once the real
 * call has succeeded it writes to the folder $COEL_POWER_CUT_SHADOW
 *
 *   files/KEY   a file's content as it is then
 *   names/KEY   a folder's entries as they are then, one a line: `f` or `d`, the entry's key, its name
 *
 * where KEY is a file's inode and time of birth: an inode alone may be another file's later. So a new name, a rename or a
 * removal counts only once its folder is synced, and a truncation once its file is. A write through a mapping counts when
 * its file is synced; msync and sync_file_range vouch for nothing.
 *
 * Each file of the shadow is replaced by a rename, so the process may be killed at any moment. A shadow that cannot be
 * written ends the process: a test must not go on with a wrong one. */

#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { KEY = 64, BUFFER = 1 << 16 };

static const char *data, *shadow;
static int (*real_fsync)(int), (*real_fdatasync)(int);
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

__attribute__((constructor)) static void start(void) {
    data = getenv("COEL_POWER_CUT_DATA");
    shadow = getenv("COEL_POWER_CUT_SHADOW");
    real_fsync = (int (*)(int))dlsym(RTLD_NEXT, "fsync");
    real_fdatasync = (int (*)(int))dlsym(RTLD_NEXT, "fdatasync");
}

static void must(int succeeded, const char *what) {
    if (!succeeded) {
        fprintf(stderr, "power cut shadow: %s: %s\n", what, strerror(errno));
        abort();
    }
}

/* The key of a file, and its type; 0 if it is gone. */
static int identify(int folder, const char *name, int flags, char key[KEY]) {
    struct statx s;
    if (statx(folder, name, flags | AT_SYMLINK_NOFOLLOW, STATX_TYPE | STATX_INO | STATX_BTIME, &s) != 0) return 0;
    long long seconds = s.stx_mask & STATX_BTIME ? s.stx_btime.tv_sec : 0;
    unsigned nanoseconds = s.stx_mask & STATX_BTIME ? s.stx_btime.tv_nsec : 0;
    snprintf(key, KEY, "%llu-%lld.%09u", (unsigned long long)s.stx_ino, seconds, nanoseconds);
    return s.stx_mode & S_IFMT;
}

static int is_ours(const char *link) {
    char path[PATH_MAX];
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (!data || !shadow || length < 0) return 0;
    path[length] = 0;
    size_t prefix = strlen(data);
    return strncmp(path, data, prefix) == 0 && (path[prefix] == 0 || path[prefix] == '/');
}

static void copy_content(const char *link, FILE *out) {
    static char buffer[BUFFER];
    /* The caller's descriptor may be for writing only. */
    int in = open(link, O_RDONLY | O_CLOEXEC);
    must(in >= 0, "opening a file");
    ssize_t length;
    while ((length = read(in, buffer, sizeof buffer)) > 0)
        must(fwrite(buffer, 1, length, out) == (size_t)length, "writing a file");
    must(length == 0, "reading a file");
    close(in);
}

static void list_entries(const char *link, FILE *out) {
    DIR *folder = opendir(link);
    must(folder != NULL, "opening a folder");
    struct dirent *entry;
    char key[KEY];
    while ((entry = readdir(folder)) != NULL) {
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0) continue;
        int type = identify(dirfd(folder), entry->d_name, 0, key);
        if (type == S_IFREG || type == S_IFDIR) fprintf(out, "%c %s %s\n", type == S_IFDIR ? 'd' : 'f', key, entry->d_name);
    }
    closedir(folder);
}

/* Notes that a file or folder is on the disk as it is now. */
static void note(int fd) {
    char link[64], key[KEY], partial[PATH_MAX], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    int type = is_ours(link) ? identify(fd, "", AT_EMPTY_PATH, key) : 0;
    if (type != S_IFREG && type != S_IFDIR) return;
    pthread_mutex_lock(&lock);
    snprintf(partial, sizeof partial, "%s/partial", shadow);
    snprintf(path, sizeof path, "%s/%s/%s", shadow, type == S_IFDIR ? "names" : "files", key);
    FILE *out = fopen(partial, "we");
    must(out != NULL, "creating a file");
    if (type == S_IFDIR) list_entries(link, out);
    else copy_content(link, out);
    must(fclose(out) == 0 && rename(partial, path) == 0, "keeping a file");
    pthread_mutex_unlock(&lock);
}

int fsync(int fd) {
    int result = real_fsync(fd);
    if (result == 0) note(fd);
    return result;
}

int fdatasync(int fd) {
    int result = real_fdatasync(fd);
    if (result == 0) note(fd);
    return result;
}
