// The sidecar loader against any bytes: it throws one line with a reason, or gives a sidecar that holds what it promises.
// Built and run by tools/fuzz.py.

#include "llama-adapter-mem-gguf.h"
#include "llama-adapter-mem-sidecar.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <stdexcept>

static void expect(bool ok, const char * what) {
    if (!ok) {
        fprintf(stderr, "FAIL %s\n", what);
        abort();
    }
}

static void check_refusal(const std::string & line) {
    const std::string start = "sidecar 'fuzz': [";
    expect(line.rfind(start, 0) == 0 && line.find("] ") != std::string::npos, line.c_str());

    const std::string reason = line.substr(start.size(), line.find("] ") - start.size());
    expect(!reason.empty() && reason.find_first_not_of("abcdefghijklmnopqrstuvwxyz0123456789-") == std::string::npos, line.c_str());

    const auto is_printable = [](char c) { return c >= 0x20 && c < 0x7f; };
    expect(std::all_of(line.begin(), line.end(), is_printable), "a refusal is one printable line");
    expect(line.size() < 1024, "a refusal is short");
}

static void check_sidecar(const llama_adapter_mem_sidecar & sidecar) {
    const auto & hparams = sidecar.hparams;
    expect(hparams.rank > 0 && hparams.n_head > 0 && hparams.n_state > 0, "no size is 0");
    expect(sidecar.n_embd > 0 && !sidecar.layers.empty(), "nothing is empty");
    expect(std::isfinite(hparams.alpha) && std::isfinite(hparams.erase_gate), "scales are finite");
    const bool is_delta = sidecar.kind == LLAMA_ADAPTER_MEM_KIND_DELTA_RULE;
    expect(is_delta || (hparams.n_lora > 0 && hparams.n_chunk > 0), "an RWKV-MS has all of its sizes");
    expect(sidecar.rope_head_dim % 2 == 0 && !sidecar.base_arch.empty(), "the base is said");
    expect(sidecar.base_sha256.size() == 64 && sidecar.fingerprint.size() == 64, "hashes are whole");

    for (const auto & layer : sidecar.layers) {
        for (int h = 0; h < 4; ++h) {
            const std::string name = std::string("delta_") + "qkvo"[h];
            expect(layer.tensors.count(name) == (sidecar.head[h] ? 1 : 0), "the deltas are those of the active heads");
        }
        expect(layer.tensors.count("mem_v") && layer.tensors.count(is_delta ? "mem_q" : "rwkv.output.weight"), "the tensors are there");
        expect(layer.tensors.count("delta_scale") == (hparams.n_scale > 0 ? 1 : 0), "the scale is there if it is trained");
        for (const auto & [name, tensor] : layer.tensors) {
            size_t n = 1;
            for (const int64_t dim : tensor.shape) {
                n *= dim;
            }
            expect(n > 0 && n == tensor.data.size(), "a tensor is as large as its shape");
            expect(std::all_of(tensor.data.begin(), tensor.data.end(), [](float x) { return std::isfinite(x); }), "values are finite");
        }
    }
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t * data, size_t size) {
    try {
        check_sidecar(*llama_adapter_mem_sidecar_read("fuzz", data, size));
    } catch (const std::runtime_error & e) {
        check_refusal(e.what());
    }
    return 0;
}

//
// mutations inside of keys and descriptions: those of libFuzzer alone rarely leave a length right
//

extern "C" size_t LLVMFuzzerMutate(uint8_t * data, size_t size, size_t max_size);

using bytes = std::vector<uint8_t>;

struct span {
    size_t at;
    size_t size;
    bool   is_text; // a length stands before it
    bool   is_json;
};

static bytes mutated(const bytes & value, bool may_grow) {
    bytes res = value;
    res.resize(value.size() + (may_grow ? 64 : 0));
    res.resize(LLVMFuzzerMutate(res.data(), value.size(), res.size()));
    if (!may_grow) {
        res.resize(value.size());
    }
    return res;
}

// a token of the text, or what stands for it, instead of another one
static bytes mutated_json(const bytes & text, std::minstd_rand & rand) {
    static const char * const others[] = {
        "null", "true", "0", "1", "-1", "2", "4096", "0.5", "1e39", "1e999", "18446744073709551616", "NaN", "\"\"", "\"q\"", "[]",
        "{}", "[1]", "{\"name\":1}", "[[[[[[[[[]]]]]]]]]", "\"\\ud800\""
    };

    std::vector<span> tokens;
    for (size_t i = 0; i < text.size(); ++i) {
        const size_t at = i;
        if (text[i] == '"') {
            for (++i; i < text.size() && text[i] != '"'; ++i) {
                i += text[i] == '\\' ? 1 : 0;
            }
            tokens.push_back({ at, std::min(i + 1, text.size()) - at, false, true });
        } else if (isalnum(text[i]) || text[i] == '-') {
            while (i + 1 < text.size() && !strchr(",:]} \n\r\t", text[i + 1])) {
                ++i;
            }
            tokens.push_back({ at, i + 1 - at, false, true });
        }
    }
    if (tokens.empty()) {
        return mutated(text, true);
    }

    const span from = tokens[rand() % tokens.size()];
    const span to   = tokens[rand() % tokens.size()];
    bytes      token;
    switch (rand() % 4) {
        case 0: {
            const std::string other = others[rand() % (sizeof(others) / sizeof(others[0]))];
            token.assign(other.begin(), other.end());
        } break;
        case 1:
            token.assign(text.begin() + from.at, text.begin() + from.at + from.size);
            break;
        default:
            token = mutated(bytes(text.begin() + to.at, text.begin() + to.at + to.size), true);
    }

    bytes res(text.begin(), text.begin() + to.at);
    res.insert(res.end(), token.begin(), token.end());
    res.insert(res.end(), text.begin() + to.at + to.size, text.end());
    return res;
}

static size_t position(const uint8_t * data, std::string_view view) {
    return (const uint8_t *) view.data() - data;
}

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t * data, size_t size, size_t max_size, unsigned int seed) {
    std::minstd_rand rand(seed);

    llama_adapter_mem_gguf gguf;
    try {
        gguf = llama_adapter_mem_gguf_read(data, size);
    } catch (const std::runtime_error &) {
    }
    if (gguf.kvs.empty() || gguf.tensors.empty() || rand() % 8 == 0) {
        return LLVMFuzzerMutate(data, size, max_size);
    }

    span         what = {};
    const auto   kind = rand() % 8;
    const auto & kv   = gguf.kvs[rand() % gguf.kvs.size()];
    if (kind == 0) {
        const auto name = rand() % 2 ? kv.name : gguf.tensors[rand() % gguf.tensors.size()].name;
        what            = { position(data, name), name.size(), true, false };
    } else if (kind == 1) {
        const auto & tensor = gguf.tensors[rand() % gguf.tensors.size()];
        what                = { position(data, tensor.name) + tensor.name.size(), 4 + 8 * tensor.shape.size() + 4 + 8, false, false };
    } else {
        const bool is_json = kv.name.size() > 5 && kv.name.substr(kv.name.size() - 5) == "_json";
        what               = { position(data, kv.value), kv.value.size(), kv.type == GGUF_TYPE_STRING, is_json };
        if (kv.type == GGUF_TYPE_ARRAY) {
            return LLVMFuzzerMutate(data, size, max_size);
        }
    }

    const bytes value(data + what.at, data + what.at + what.size);
    const bytes other = what.is_json && rand() % 8 != 0 ? mutated_json(value, rand) : mutated(value, what.is_text);

    // the header up to its end, padded anew, and the tensors as they were
    const auto & last  = gguf.tensors.back();
    const size_t end   = position(data, last.name) + last.name.size() + 4 + 8 * last.shape.size() + 4 + 8;
    const size_t start = gguf.tensors.front().data - data;

    bytes res(data, data + what.at);
    if (what.is_text) {
        const uint64_t n = other.size();
        memcpy(&res[what.at - 8], &n, 8);
    }
    res.insert(res.end(), other.begin(), other.end());
    res.insert(res.end(), data + what.at + what.size, data + end);
    res.resize((res.size() + 31) / 32 * 32);
    res.insert(res.end(), data + start, data + size);
    if (res.size() > max_size) {
        return LLVMFuzzerMutate(data, size, max_size);
    }
    memcpy(data, res.data(), res.size());
    return res.size();
}
