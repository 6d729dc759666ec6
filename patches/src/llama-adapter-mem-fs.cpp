#include "llama-adapter-mem-fs.h"

#include "ggml.h"

#include <atomic>
#include <cerrno>
#include <cstring>

#include <sys/stat.h>

#if defined(_WIN32)
#include <io.h>
#include <process.h>
#include <windows.h>
#else
#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>
#endif

//
// reading
//

llama_adapter_mem_fs_ptr llama_adapter_mem_fs_open(const std::string & path, uint64_t & size, std::string & err) {
#if defined(_WIN32)
    llama_adapter_mem_fs_ptr res(ggml_fopen(path.c_str(), "rb"));

    struct _stat64 st         = {};
    const bool     ok         = res && _fstat64(_fileno(res.get()), &st) == 0;
    const bool     is_regular = (st.st_mode & _S_IFREG) != 0;
#else
    // without a writer, the end of a pipe is opened only if nobody wants to wait for one
    const int                fd = open(path.c_str(), O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
    llama_adapter_mem_fs_ptr res(fd < 0 ? nullptr : fdopen(fd, "rb"));

    struct stat st         = {};
    const bool  ok         = res && fstat(fd, &st) == 0;
    const bool  is_regular = S_ISREG(st.st_mode);
#endif
    if (!ok) {
        err = std::string("cannot be opened: ") + strerror(errno);
        return nullptr;
    }
    if (!is_regular) {
        err = "is not a file";
        return nullptr;
    }
    size = st.st_size;
    return res;
}

bool llama_adapter_mem_fs_read(FILE * file, uint64_t at, void * data, size_t n) {
#if defined(_WIN32)
    const bool ok = _fseeki64(file, at, SEEK_SET) == 0;
#else
    const bool ok = fseeko(file, at, SEEK_SET) == 0;
#endif
    return ok && (n == 0 || fread(data, 1, n, file) == n);
}

//
// writing
//

static std::string adapter_mem_fs_dir(const std::string & path) {
#if defined(_WIN32)
    const size_t slash = path.find_last_of("/\\");
#else
    const size_t slash = path.find_last_of('/');
#endif
    return slash == std::string::npos ? "" : path.substr(0, slash + 1);
}

#define ADAPTER_MEM_FS_PART ".llamamem-%lld-%u.part" // process, number

#if !defined(_WIN32)
static const int ADAPTER_MEM_FS_PART_AGE = 60; // seconds

// parts of processes that are gone; the pid of one elsewhere that shares the directory may look like it, hence the age
static void adapter_mem_fs_sweep(const std::string & dir) {
    DIR * it = opendir(dir.empty() ? "." : dir.c_str());
    if (!it) {
        return;
    }
    while (const dirent * entry = readdir(it)) {
        long long pid = 0;
        unsigned  n   = 0;
        int       end = 0;
        if (sscanf(entry->d_name, ADAPTER_MEM_FS_PART "%n", &pid, &n, &end) != 2 || end == 0 || entry->d_name[end] != '\0' || pid <= 0) {
            continue;
        }
        const std::string path = dir + entry->d_name;

        struct stat st;
        if (kill((pid_t) pid, 0) != 0 && errno == ESRCH && lstat(path.c_str(), &st) == 0 && S_ISREG(st.st_mode) &&
                time(nullptr) - st.st_mtime > ADAPTER_MEM_FS_PART_AGE) {
            unlink(path.c_str());
        }
    }
    closedir(it);
}
#endif

// a new file: whatever has the name already is not written to, a link is not followed
static llama_adapter_mem_fs_ptr adapter_mem_fs_create(const std::string & path) {
#if defined(_WIN32)
    return llama_adapter_mem_fs_ptr(ggml_fopen(path.c_str(), "wbx"));
#else
    const int fd = open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    return llama_adapter_mem_fs_ptr(fd < 0 ? nullptr : fdopen(fd, "wb"));
#endif
}

static llama_adapter_mem_fs_ptr adapter_mem_fs_create_part(const std::string & dir, std::string & part) {
    static std::atomic<unsigned> n_parts = 0;

#if defined(_WIN32)
    const long long pid = _getpid();
#else
    const long long pid = getpid();
#endif
    // a process before this one with its pid, or one elsewhere, may have left some
    for (int i = 0; i < 1000; ++i) {
        char name[64];
        snprintf(name, sizeof(name), ADAPTER_MEM_FS_PART, pid, n_parts++);

        part = dir + name;
        if (auto res = adapter_mem_fs_create(part)) {
            return res;
        }
        if (errno != EEXIST) {
            return nullptr;
        }
    }
    return nullptr;
}

static bool adapter_mem_fs_sync(FILE * file) {
    if (fflush(file) != 0) {
        return false;
    }
#if defined(_WIN32)
    return _commit(_fileno(file)) == 0;
#else
    return fsync(fileno(file)) == 0;
#endif
}

static bool adapter_mem_fs_replace(const std::string & from, const std::string & to, const std::string & dir) {
#if defined(_WIN32)
    (void) dir;
    return MoveFileExA(from.c_str(), to.c_str(), MOVEFILE_REPLACE_EXISTING | MOVEFILE_WRITE_THROUGH) != 0;
#else
    if (rename(from.c_str(), to.c_str()) != 0) {
        return false;
    }
    // the new name has to reach the disk too
    const int fd = open(dir.empty() ? "." : dir.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd >= 0) {
        fsync(fd);
        close(fd);
    }
    return true;
#endif
}

std::string llama_adapter_mem_fs_write(const std::string & path, const void * data, size_t size) {
    const std::string dir = adapter_mem_fs_dir(path);
#if !defined(_WIN32)
    adapter_mem_fs_sweep(dir);
#endif

    std::string part;
    auto        file = adapter_mem_fs_create_part(dir, part);
    if (!file) {
        return strerror(errno);
    }

    const bool ok  = fwrite(data, 1, size, file.get()) == size && adapter_mem_fs_sync(file.get());
    const int  err = errno;
    file.reset();

    if (ok && adapter_mem_fs_replace(part, path, dir)) {
        return "";
    }
    const std::string what = strerror(ok ? errno : err);
    remove(part.c_str());
    return what;
}
