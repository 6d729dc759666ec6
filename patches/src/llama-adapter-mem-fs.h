#pragma once

// Files on disk. What is read is a regular file: nobody waits for a pipe, or reads a device that has no end. What is written
// is its owner's alone, and is under its name as a whole or not at all.

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <string>

struct llama_adapter_mem_fs_closer {
    void operator()(FILE * file) const { fclose(file); }
};

using llama_adapter_mem_fs_ptr = std::unique_ptr<FILE, llama_adapter_mem_fs_closer>;

// to be read, and its size in bytes; or nullptr, and err says what is wrong
llama_adapter_mem_fs_ptr llama_adapter_mem_fs_open(const std::string & path, uint64_t & size, std::string & err);

// false: it has no n bytes there, or ferror
bool llama_adapter_mem_fs_read(FILE * file, uint64_t at, void * data, size_t n);

// Written beside the target, flushed to disk and renamed; "" or what went wrong, and then a file that was there is whole. What
// killed processes left in the directory is removed.
std::string llama_adapter_mem_fs_write(const std::string & path, const void * data, size_t size);
