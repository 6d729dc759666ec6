#pragma once

// A small sidecar, to be spoilt before it is written.

#include "llama-adapter-mem-config.h"
#include "llama-adapter-mem-sha256.h"
#include "llama-adapter-mem-sidecar.h"

#include "ggml-cpp.h"
#include "gguf.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <limits>
#include <stdexcept>

using json = nlohmann::json;

namespace fs = std::filesystem;

static const int64_t H = 16;
static const int64_t D = 8;
static const int64_t L = 4;

struct test_tensor {
    std::vector<int64_t> shape;
    ggml_type            type;
    std::vector<uint8_t> data;
};

static inline std::vector<uint8_t> encode(ggml_type type, const std::vector<float> & values) {
    std::vector<uint8_t> res(values.size() * ggml_type_size(type));
    for (size_t i = 0; i < values.size(); ++i) {
        if (type == GGML_TYPE_BF16) {
            const ggml_bf16_t x = ggml_fp32_to_bf16(values[i]);
            memcpy(&res[2 * i], &x, 2);
        } else if (type == GGML_TYPE_F16) {
            const ggml_fp16_t x = ggml_fp32_to_fp16(values[i]);
            memcpy(&res[2 * i], &x, 2);
        } else if (type == GGML_TYPE_F32) {
            memcpy(&res[4 * i], &values[i], 4);
        } else {
            const double x = values[i];
            memcpy(&res[8 * i], &x, 8);
        }
    }
    return res;
}

static inline test_tensor make_tensor(const std::vector<int64_t> & shape, ggml_type type = GGML_TYPE_BF16, float last = 0.5f) {
    int64_t n = 1;
    for (const int64_t ne : shape) {
        n *= ne;
    }
    std::vector<float> values(n);
    for (int64_t i = 0; i < n; ++i) {
        values[i] = 0.125f * (i % 16) - 1.0f; // exact in all types
    }
    values.back() = last;
    return { shape, type, encode(type, values) };
}

struct test_sidecar {
    std::string arch   = "rwkv_ms_memory";
    int         format = 1;

    std::map<std::string, std::string> strs;
    std::map<std::string, uint32_t>    u32s;
    std::map<std::string, uint64_t>    u64s; // total_* are filled in when written
    std::map<std::string, json>        jsons;

    json config;
    json manifest; // filled in when written

    float    alpha     = 16.0f;
    uint32_t alignment = 0;

    std::map<std::string, test_tensor> tensors;

    std::function<void(json &)>                 edit_manifest;
    std::function<void(gguf_context *)>         edit_gguf;
    std::function<void(std::vector<uint8_t> &)> edit_file;

    explicit test_sidecar(int format = 1) : format(format) {
        strs = {
            { "schema", "delta_mem_rwkv_ms_memory_gguf_sidecar.v" + std::to_string(format) },
            { "status", "test" },
            { "memory_type", "delta-mem-rwkv-ms" },
            { "memory_backend", "rwkv_ms" },
            { "memory_readout_mode", "delta" },
            { "base_model", "test" },
            { "base_gguf", "test.gguf" },
            { "base_gguf_sha256", std::string(63, 'A') + "0" },
            { "rwkv_ms_boundary_mode", "fixed_chunk" },
            { "tensor_name_format", "compact_with_source_name_manifest" },
        };
        u32s = {
            { "format_version", (uint32_t) format },
            { "rank", 8 },
            { "num_state_heads", 1 },
            { "rwkv_ms_num_states", 4 },
            { "rwkv_ms_chunk_size", 48 },
        };
        config = {
            { "rank", 8 },
            { "alpha", 16.0 },
            { "num_state_heads", 1 },
            { "rwkv_ms_num_states", 4 },
            { "rwkv_ms_chunk_size", 48 },
            { "rwkv_ms_erase_gate", 1.0 },
            { "couple_lambda", true },
            { "state_update_mode", "standard" },
            { "rankwise_gates", true },
            { "memory_backend", "rwkv_ms" },
            { "memory_readout_mode", "delta" },
            { "rwkv_ms_boundary_mode", "fixed_chunk" },
            { "target_layers", { 0, 5 } },
            { "delta_heads", { "q", "o" } },
            { "rwkv_ms_write_mode", "recurrent" },
            { "rwkv_ms_hybrid_gain", 0.125 },
        };
        if (format == 2) {
            strs["rwkv_ms_state_dtype"] = "f32";
            set_semantics(2);
        }
        for (const int il : { 0, 5 }) {
            jsons["per_layer_attention_json"].push_back({
                    { "layer", il },
                    { "attention_kind", il == 0 ? "sliding_attention" : "full_attention" },
                    { "q_out", 32 },
                    { "k_out", 8 },
                    { "v_out", 8 },
                    { "o_out", H },
                    { "active_delta_heads", { "q", "o" } },
                    { "compat_delta_heads", { "q", "k", "v", "o" } },
            });
            add_layer(il);
        }
    }

    void set_semantics(uint32_t semantics) {
        u32s["rwkv_ms_semantics_version"]   = semantics;
        config["rwkv_ms_semantics_version"] = semantics;
    }

    void add_layer(int il) {
        const std::string blk = "blk." + std::to_string(il) + ".";
        for (const char * name : { "mem_q", "mem_k", "mem_v", "beta" }) {
            tensors[blk + name] = make_tensor({ D, H });
        }
        tensors[blk + "beta_b"] = make_tensor({ D });
        for (const char * name : { "x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "w0", "a0", "k_k", "k_a", "ln_x.weight", "ln_x.bias" }) {
            tensors[blk + "rwkv." + name] = make_tensor({ D });
        }
        for (const char * name : { "w", "a", "g" }) {
            tensors[blk + "rwkv." + name + "1"] = make_tensor({ D, L });
            tensors[blk + "rwkv." + name + "2"] = make_tensor({ L, D });
        }
        for (const char * name : { "receptance", "key", "value", "output" }) {
            tensors[blk + "rwkv." + name + ".weight"] = make_tensor({ D, D });
        }
        tensors[blk + "delta_q"] = make_tensor({ 32, D });
        tensors[blk + "delta_k"] = make_tensor({ 8, D });
        tensors[blk + "delta_v"] = make_tensor({ 8, D });
        tensors[blk + "delta_o"] = make_tensor({ H, D });
    }

    static std::string source_name(const std::string & name) {
        static const std::map<std::string, std::string> tails = {
            { "mem_q", "memory_q_proj" },
            { "mem_k", "memory_k_proj" },
            { "mem_v", "memory_v_proj" },
            { "beta", "beta_proj" },
            { "beta_b", "beta_bias" },
            { "lambda", "lambda_proj" },
            { "lambda_b", "lambda_bias" },
            { "delta_q", "delta_q_proj" },
            { "delta_k", "delta_k_proj" },
            { "delta_v", "delta_v_proj" },
            { "delta_o", "delta_o_proj" },
        };
        const size_t      dot  = name.find('.', 4);
        const std::string tail = name.substr(dot + 1);
        return "model.language_model.layers." + name.substr(4, dot - 4) + ".self_attn." +
                (tails.count(tail) ? tails.at(tail) : "hrm_rwkv7_core." + tail.substr(tail.find('.') + 1));
    }

    void write(const fs::path & path) {
        gguf_context_ptr gguf(gguf_init_empty());
        ggml_context_ptr ctx(ggml_init({ ggml_tensor_overhead() * (tensors.size() + 1), nullptr, /*no_alloc =*/true }));

        gguf_set_val_str(gguf.get(), "general.architecture", arch.c_str());
        if (alignment) {
            gguf_set_val_u32(gguf.get(), "general.alignment", alignment);
        }

        manifest         = json::array();
        uint64_t n_numel = 0;
        uint64_t n_bytes = 0;
        for (auto & [name, t] : tensors) {
            const std::vector<int64_t> ne(t.shape.rbegin(), t.shape.rend());
            ggml_tensor *              tensor = ggml_new_tensor(ctx.get(), t.type, (int) ne.size(), ne.data());
            ggml_set_name(tensor, name.c_str());
            tensor->data = t.data.data();
            gguf_add_tensor(gguf.get(), tensor);

            const uint64_t numel = ggml_nelements(tensor);
            n_numel += numel;
            n_bytes += t.data.size();
            std::string type = ggml_type_name(t.type);
            for (char & c : type) {
                c = (char) toupper(c);
            }
            manifest.push_back({
                    { "name", name },
                    { "source_name", source_name(name) },
                    { "shape", t.shape },
                    { "torch_dtype", "torch.bfloat16" },
                    { "gguf_type", type },
                    { "numel", numel },
                    { "bytes", t.data.size() },
                    { "sha256_raw", llama_adapter_mem_sha256::hex(llama_adapter_mem_sha256::hash(t.data.data(), t.data.size())) },
            });
        }
        if (edit_manifest) {
            edit_manifest(manifest);
        }

        u32s.emplace("tensor_count", (uint32_t) tensors.size());
        u64s.emplace("total_numel", n_numel);
        u64s.emplace("total_bytes", n_bytes);
        jsons.emplace("target_layers_json", config.contains("target_layers") ? config["target_layers"] : json::array());
        jsons.emplace("delta_heads_json", config.contains("delta_heads") ? config["delta_heads"] : json::array());
        jsons.emplace("config_json", config);
        jsons.emplace("tensor_manifest_json", manifest);

        for (const auto & [key, value] : strs) {
            gguf_set_val_str(gguf.get(), ("delta_mem." + key).c_str(), value.c_str());
        }
        for (const auto & [key, value] : u32s) {
            gguf_set_val_u32(gguf.get(), ("delta_mem." + key).c_str(), value);
        }
        for (const auto & [key, value] : u64s) {
            gguf_set_val_u64(gguf.get(), ("delta_mem." + key).c_str(), value);
        }
        for (const auto & [key, value] : jsons) {
            if (!strs.count(key)) {
                gguf_set_val_str(gguf.get(), ("delta_mem." + key).c_str(), value.dump().c_str());
            }
        }
        gguf_set_val_f32(gguf.get(), "delta_mem.alpha", alpha);
        if (edit_gguf) {
            edit_gguf(gguf.get());
        }

        gguf_write_to_file(gguf.get(), path.string().c_str(), /*only_meta =*/false);

        if (edit_file) {
            std::ifstream        in(path, std::ios::binary);
            std::vector<uint8_t> file((std::istreambuf_iterator<char>(in)), {});
            in.close();
            edit_file(file);
            std::ofstream(path, std::ios::binary).write((const char *) file.data(), file.size());
        }
    }
};
