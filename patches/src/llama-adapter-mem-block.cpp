#include "llama-adapter-mem-state.h"

#include "llama-adapter-mem-gguf.h"
#include "llama-adapter-mem-sha256.h"

#include "ggml-rwkv-ms.h"

#include <algorithm>
#include <cmath>
#include <cstring>

static const uint32_t ADAPTER_MEM_BLOCK_VERSION = 1;

static void adapter_mem_from_hex(uint8_t (&dst)[32], const char * hex) {
    for (size_t i = 0; i < sizeof(dst); ++i) {
        dst[i] = (uint8_t) std::stoi(std::string(hex + 2 * i, 2), nullptr, 16);
    }
}

static std::string adapter_mem_to_hex(const uint8_t (&src)[32]) {
    llama_adapter_mem_sha256::digest digest;
    memcpy(digest.data(), src, sizeof(src));
    return llama_adapter_mem_sha256::hex(digest);
}

static llama_adapter_mem_block_header adapter_mem_block_header_init(const llama_adapter_mem & adapter) {
    llama_adapter_mem_block_header res = {};

    memcpy(res.magic, "RMVS", sizeof(res.magic));

    res.version   = ADAPTER_MEM_BLOCK_VERSION;
    res.n_header  = sizeof(res);
    res.n_layer   = adapter.info.n_layer;
    res.n_head    = adapter.core.params.n_head;
    res.n_state   = adapter.core.params.n_state;
    res.rank      = adapter.core.params.n_rank;
    res.n_chunk   = adapter.core.params.n_chunk;
    res.semantics = adapter.core.params.semantics; // 0: the delta rule
    res.n_cell    = adapter.core.n_cell();

    adapter_mem_from_hex(res.fingerprint, adapter.info.fingerprint);
    adapter_mem_from_hex(res.sidecar, adapter.info.sidecar_sha256);
    adapter_mem_from_hex(res.base, adapter.info.base_sha256);

    return res;
}

static llama_adapter_mem_sha256::digest adapter_mem_block_hash(llama_adapter_mem_block_header header, const void * cells, size_t size) {
    memset(header.checksum, 0, sizeof(header.checksum));

    llama_adapter_mem_sha256 hash;
    hash.update(&header, sizeof(header));
    hash.update(cells, size);
    return hash.final();
}

uint64_t llama_adapter_mem_block_n_cells(const llama_adapter_mem_block_header & header) {
    return (uint64_t) header.n_cells * (header.flags & LLAMA_ADAPTER_MEM_BLOCK_ORIGIN ? 2 : 1);
}

std::vector<uint8_t> llama_adapter_mem_block_write(
        const llama_adapter_mem &         adapter,
        uint32_t                          kind,
        const std::vector<float> &        cells,
        const std::vector<float> &        origins,
        const llama_adapter_mem_setting & setting,
        uint64_t                          n_bytes_kv) {
    GGML_ASSERT(origins.empty() || origins.size() == cells.size());

    auto header = adapter_mem_block_header_init(adapter);

    header.kind       = kind;
    header.n_cells    = cells.size() / ((size_t) header.n_layer * header.n_cell);
    header.n_bytes_kv = n_bytes_kv;
    header.flags      = origins.empty() ? 0 : LLAMA_ADAPTER_MEM_BLOCK_ORIGIN;

    if (setting.scale != 1.0f || setting.frozen != 0 || setting.tag != 0) {
        header.flags |= LLAMA_ADAPTER_MEM_BLOCK_SETTING;
        memcpy(header.note, &setting, sizeof(setting));
    }

    std::vector<float> all = cells;
    all.insert(all.end(), origins.begin(), origins.end());

    const auto digest = adapter_mem_block_hash(header, all.data(), all.size() * sizeof(float));
    memcpy(header.checksum, digest.data(), sizeof(header.checksum));

    std::vector<uint8_t> res(sizeof(header) + all.size() * sizeof(float));
    memcpy(res.data(), &header, sizeof(header));
    memcpy(res.data() + sizeof(header), all.data(), all.size() * sizeof(float));
    return res;
}

static const char * adapter_mem_kind_name(uint32_t kind) {
    static const char * const names[] = { "one sequence", "a whole context", "a checkpoint", "a memory alone" };

    return kind >= 1 && kind <= 4 ? names[kind - 1] : "an unknown kind of state";
}

static void adapter_mem_block_check_version(const llama_adapter_mem_block_header & header) {
    if (memcmp(header.magic, "RMVS", sizeof(header.magic)) != 0) {
        llama_adapter_mem_state_fail("state-no-memory", "the state has no memory in it: it was saved without a sidecar");
    }
    if (header.version != ADAPTER_MEM_BLOCK_VERSION || header.n_header != sizeof(header)) {
        llama_adapter_mem_state_fail("state-version", "the memory has version %u, this build reads %u: load it with the build that saved it",
                header.version, ADAPTER_MEM_BLOCK_VERSION);
    }
}

static_assert(sizeof(llama_adapter_mem_setting) == 16, "the layout is documented");

llama_adapter_mem_setting llama_adapter_mem_block_setting(const llama_adapter_mem_block_header & header) {
    llama_adapter_mem_setting res;
    if (header.flags & LLAMA_ADAPTER_MEM_BLOCK_SETTING) {
        memcpy(&res, header.note, sizeof(res));
    }
    return res;
}

// a setting and then zeros
static bool adapter_mem_setting_check(const llama_adapter_mem_block_header & header) {
    const auto setting = llama_adapter_mem_block_setting(header);

    return (header.flags & LLAMA_ADAPTER_MEM_BLOCK_DERIVED) == 0 && std::isfinite(setting.scale) && setting.frozen <= 1 &&
            std::all_of(header.note + sizeof(setting), header.note + sizeof(header.note), [](char c) { return c == 0; });
}

// a text in UTF-8 and then zeros; none unless a tool made the state
static bool adapter_mem_note_check(const llama_adapter_mem_block_header & header) {
    if (header.flags & LLAMA_ADAPTER_MEM_BLOCK_SETTING) {
        return adapter_mem_setting_check(header);
    }

    const std::string note(header.note, sizeof(header.note));
    const size_t      n = header.flags & LLAMA_ADAPTER_MEM_BLOCK_DERIVED ? std::min(note.find('\0'), note.size()) : 0;

    return note.find_first_not_of('\0', n) == std::string::npos && llama_adapter_mem_is_utf8({ note.data(), n });
}

void llama_adapter_mem_block_check(const llama_adapter_mem & adapter, const llama_adapter_mem_block_header & header, uint32_t kind, uint32_t n_cells) {
    adapter_mem_block_check_version(header);

    const auto expected = adapter_mem_block_header_init(adapter);

    if (memcmp(header.fingerprint, expected.fingerprint, sizeof(header.fingerprint)) != 0 ||
            memcmp(header.sidecar, expected.sidecar, sizeof(header.sidecar)) != 0 ||
            memcmp(header.base, expected.base, sizeof(header.base)) != 0) {
        llama_adapter_mem_state_fail("state-identity", "the state belongs to sidecar %s and base %s, this model has sidecar %s and base %s",
                adapter_mem_to_hex(header.sidecar).c_str(), adapter_mem_to_hex(header.base).c_str(), adapter.info.sidecar_sha256, adapter.info.base_sha256);
    }
    if (header.kind != kind) {
        llama_adapter_mem_state_fail("state-kind", "the state is that of %s, expected %s", adapter_mem_kind_name(header.kind), adapter_mem_kind_name(kind));
    }
    if (header.n_cells != n_cells) {
        llama_adapter_mem_state_fail("state-shape", "the state has %u sequences, expected %u", header.n_cells, n_cells);
    }

    const uint32_t flags = LLAMA_ADAPTER_MEM_BLOCK_DERIVED |
            (kind == LLAMA_ADAPTER_MEM_BLOCK_MEMORY ? 0 : LLAMA_ADAPTER_MEM_BLOCK_ORIGIN) |
            (kind == LLAMA_ADAPTER_MEM_BLOCK_SEQ || kind == LLAMA_ADAPTER_MEM_BLOCK_PARTIAL ? LLAMA_ADAPTER_MEM_BLOCK_SETTING : 0);

    if (header.n_layer != expected.n_layer || header.n_head != expected.n_head || header.n_state != expected.n_state || header.rank != expected.rank ||
            header.n_chunk != expected.n_chunk || header.semantics != expected.semantics || header.n_cell != expected.n_cell ||
            header.zero != 0 || (header.flags & ~flags) != 0 || (kind == LLAMA_ADAPTER_MEM_BLOCK_MEMORY && header.n_bytes_kv != 0) ||
            !adapter_mem_note_check(header)) {
        llama_adapter_mem_state_fail("state-shape", "the state has %u layers of %u values, this model %u of %u, or their parts differ",
                header.n_layer, header.n_cell, expected.n_layer, expected.n_cell);
    }
}

static void adapter_mem_block_check_size(const llama_adapter_mem_block_header & header, uint64_t n_rest) {
    // no overflow: the factors have 32 bits, and each product is compared before the next
    const uint64_t n_floats = (uint64_t) header.n_layer * header.n_cell;
    const uint64_t n_all    = llama_adapter_mem_block_n_cells(header);

    if (n_floats > n_rest || n_all > n_rest || n_floats * n_all > n_rest / sizeof(float) ||
            header.n_bytes_kv != n_rest - n_floats * n_all * sizeof(float)) {
        llama_adapter_mem_state_fail("state-truncated", "the state has %llu bytes after its header, which says another number: it is cut, or something was added",
                (unsigned long long) n_rest);
    }
}

void llama_adapter_mem_block_check_head(const llama_adapter_mem & adapter, const llama_adapter_mem_block_header & header, uint64_t n_rest, uint32_t kind, uint32_t n_cells) {
    adapter_mem_block_check_version(header);
    adapter_mem_block_check_size(header, n_rest);

    llama_adapter_mem_block_check(adapter, header, kind, n_cells);
}

void llama_adapter_mem_block_check_cells(const llama_adapter_mem & adapter, const llama_adapter_mem_block_header & header, const std::vector<float> & cells) {
    const auto digest = adapter_mem_block_hash(header, cells.data(), cells.size() * sizeof(float));

    if (memcmp(digest.data(), header.checksum, sizeof(header.checksum)) != 0) {
        llama_adapter_mem_state_fail("state-checksum", "the memory does not have its checksum: the state is damaged");
    }

    // a checkpoint never leaves RAM: it brings back what was there, and what is not finite ends that text
    if (header.kind == LLAMA_ADAPTER_MEM_BLOCK_PARTIAL) {
        return;
    }

    const size_t n_cell = (size_t) header.n_layer * header.n_cell;
    for (size_t i = 0; i < cells.size(); i += n_cell) {
        const std::string what = llama_adapter_mem_cell_check(adapter, cells.data() + i);
        if (!what.empty()) {
            llama_adapter_mem_state_fail("state-values", "%s", what.c_str());
        }
    }
}

std::string llama_adapter_mem_cell_check(const llama_adapter_mem & adapter, const float * cell) {
    const int64_t n_cell   = adapter.core.n_cell();
    const float   n_period = (float) adapter.core.params.n_state * adapter.core.params.n_chunk;

    for (const auto & layer : adapter.layers) {
        for (int64_t j = 0; j < n_cell; ++j) {
            if (!std::isfinite(cell[j])) {
                return format("layer %d: value %lld is not finite", layer.il, (long long) j);
            }
        }

        const float n_lo = cell[n_cell - 2];
        const float n_hi = cell[n_cell - 1];

        if (n_lo < 0 || n_lo >= n_period || n_lo != std::floor(n_lo) || n_hi < 0 || n_hi > (1 << 24) || n_hi != std::floor(n_hi)) {
            return format("layer %d: the token counter is out of range", layer.il);
        }
        cell += n_cell;
    }
    return "";
}

void llama_adapter_mem_block_check_data(const llama_adapter_mem & adapter, const uint8_t * data, size_t size, uint32_t kind, uint32_t n_cells) {
    llama_adapter_mem_block_header header = {};

    memcpy(&header, data, std::min(size, sizeof(header)));

    adapter_mem_block_check_version(header);

    if (size < sizeof(header)) {
        llama_adapter_mem_state_fail("state-truncated", "the state ends within its header: it is cut");
    }
    adapter_mem_block_check_size(header, size - sizeof(header));

    const size_t n_values = (size - sizeof(header) - header.n_bytes_kv) / sizeof(float);

    const auto digest = adapter_mem_block_hash(header, data + sizeof(header), n_values * sizeof(float));
    if (memcmp(digest.data(), header.checksum, sizeof(header.checksum)) != 0) {
        llama_adapter_mem_state_fail("state-checksum", "the memory does not have its checksum: the state is damaged");
    }

    llama_adapter_mem_block_check(adapter, header, kind, n_cells);

    std::vector<float> cells(n_values);
    memcpy(cells.data(), data + sizeof(header), cells.size() * sizeof(float));

    llama_adapter_mem_block_check_cells(adapter, header, cells);
}
