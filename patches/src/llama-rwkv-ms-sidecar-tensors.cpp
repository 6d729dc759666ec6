#include "llama-rwkv-ms-config.h"
#include "llama-rwkv-ms-sha256.h"
#include "llama-rwkv-ms-sidecar.h"

#include "gguf.h"

#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstring>
#include <iterator>

using json = nlohmann::json;

static const int64_t RWKV_MS_MAX_COLS = 1 << 20;

using rwkv_ms_shape = std::vector<int64_t>;

static std::string rwkv_ms_shape_text(const rwkv_ms_shape & shape) {
    std::string res = "[";
    for (size_t i = 0; i < shape.size(); ++i) {
        res += (i > 0 ? ", " : "") + std::to_string(shape[i]);
    }
    return res + "]";
}

struct rwkv_ms_spec {
    rwkv_ms_shape shape;    // torch order
    bool          required;
    bool          used;     // by the maths
};

// the tensors of one layer by short name
static std::map<std::string, rwkv_ms_spec> rwkv_ms_layer_specs(const llama_rwkv_ms_sidecar & sidecar, const llama_rwkv_ms_sidecar::layer & layer) {
    const int64_t H = sidecar.n_embd;
    const int64_t D = sidecar.hparams.n_rank_total();
    const int64_t G = sidecar.hparams.n_gate;
    const int64_t L = sidecar.hparams.n_lora;

    std::map<std::string, rwkv_ms_spec> res = {
        { "mem_q", { { D, H }, false, false } }, // of other backends
        { "mem_k", { { D, H }, false, false } },
        { "mem_v", { { D, H }, true, true } },
        { "beta", { { G, H }, true, true } },
        { "beta_b", { { G }, true, true } },

        { "rwkv.ln_x.bias", { { D }, true, false } }, // is not applied
    };

    for (const char * name : { "x_r", "x_w", "x_k", "x_v", "x_a", "x_g", "w0", "a0", "k_k", "k_a", "ln_x.weight" }) {
        res[std::string("rwkv.") + name] = { { D }, true, true };
    }
    for (const char * name : { "receptance", "key", "value", "output" }) {
        res[std::string("rwkv.") + name + ".weight"] = { { D, D }, true, true };
    }
    for (const char * name : { "w", "a", "g" }) {
        res[std::string("rwkv.") + name + "1"] = { { D, L }, true, true };
        res[std::string("rwkv.") + name + "2"] = { { L, D }, true, true };
    }
    if (!sidecar.hparams.couple_lambda) {
        res["lambda"]   = { { G, H }, true, true };
        res["lambda_b"] = { { G }, true, true };
    }
    for (int h = 0; h < 4; ++h) {
        if (layer.width[h] > 0) {
            res[std::string("delta_") + "qkvo"[h]] = { { layer.width[h], D }, sidecar.head[h], sidecar.head[h] };
        }
    }
    return res;
}

// the name in the checkpoint, spec: model.language_model.layers.{L}.self_attn.{tail}
static std::string rwkv_ms_source_name(int32_t il, const std::string & name) {
    static const std::map<std::string, std::string> tails = {
        { "mem_q", "memory_q_proj" },
        { "mem_k", "memory_k_proj" },
        { "mem_v", "memory_v_proj" },
        { "beta", "beta_proj" },
        { "beta_b", "beta_bias" },
        { "lambda", "lambda_proj" },
        { "lambda_b", "lambda_bias" },
    };

    const auto it = tails.find(name);

    return "model.language_model.layers." + std::to_string(il) + ".self_attn." + (it != tails.end() ? it->second : name.rfind("rwkv.", 0) == 0 ? "hrm_rwkv7_core." + name.substr(5)
                                                                                                                                               : name + "_proj");
}

struct rwkv_ms_reader {
    const std::vector<uint8_t> & file;
    const gguf_context *         gguf;

    std::map<std::string, int64_t>      ids;      // tensors of the file
    std::map<std::string, const json *> manifest;

    // only what the API gives: trailing dimensions of 1 are not told apart
    rwkv_ms_shape shape(int64_t id) const {
        const int64_t * ne = gguf_get_tensor_ne(gguf, id);

        int n_dims = GGML_MAX_DIMS;
        while (n_dims > 1 && ne[n_dims - 1] == 1) {
            n_dims--;
        }
        return rwkv_ms_shape(std::make_reverse_iterator(ne + n_dims), std::make_reverse_iterator(ne));
    }

    // columns of a matrix, before it is known what they must be
    int64_t n_cols(const std::string & name) const {
        const auto it = ids.find(name);
        if (it == ids.end()) {
            llama_rwkv_ms_fail("tensor '%s' is missing: export the sidecar again", name.c_str());
        }
        const int64_t n = gguf_get_tensor_ne(gguf, it->second)[0];
        if (n < 1 || n > RWKV_MS_MAX_COLS) {
            llama_rwkv_ms_fail("tensor '%s' has %lld columns, must be from 1 to %lld", name.c_str(), (long long) n, (long long) RWKV_MS_MAX_COLS);
        }
        return n;
    }

    const uint8_t * data(int64_t id) const {
        return file.data() + gguf_get_data_offset(gguf) + gguf_get_tensor_offset(gguf, id);
    }

    void                 index(const llama_rwkv_ms_manifest & m);
    void                 check(const std::string & name, const std::string & source, const rwkv_ms_spec & spec) const;
    llama_rwkv_ms_tensor load(const std::string & name, const rwkv_ms_spec & spec) const;
};

void rwkv_ms_reader::index(const llama_rwkv_ms_manifest & m) {
    uint64_t n_numel = 0;
    uint64_t n_bytes = 0;
    size_t   end     = gguf_get_data_offset(gguf);

    for (int64_t i = 0; i < gguf_get_n_tensors(gguf); ++i) {
        const std::string name = gguf_get_tensor_name(gguf, i);
        const ggml_type   type = gguf_get_tensor_type(gguf, i);
        const size_t      size = gguf_get_tensor_size(gguf, i);
        const size_t      offs = gguf_get_data_offset(gguf) + gguf_get_tensor_offset(gguf, i);

        if (!ids.emplace(name, i).second) {
            llama_rwkv_ms_fail("tensor %s is there twice", llama_rwkv_ms_quote(name).c_str());
        }
        if (type != GGML_TYPE_BF16 && type != GGML_TYPE_F16 && type != GGML_TYPE_F32) {
            llama_rwkv_ms_fail("tensor %s has type %s, must be bf16, f16 or f32: export the sidecar again",
                    llama_rwkv_ms_quote(name).c_str(), ggml_type_name(type));
        }
        if (offs > file.size() || size > file.size() - offs) {
            llama_rwkv_ms_fail("is truncated: tensor %s ends at byte %zu, the file has %zu: copy it again",
                    llama_rwkv_ms_quote(name).c_str(), offs + size, file.size());
        }
        n_numel += size / ggml_type_size(type);
        n_bytes += size;
        end = std::max(end, offs + GGML_PAD(size, gguf_get_alignment(gguf)));
    }
    if (file.size() > end) {
        llama_rwkv_ms_fail("has %zu bytes after its last tensor: copy or export it again", file.size() - end);
    }
    if (ids.size() != m.n_tensors || n_numel != m.n_numel || n_bytes != m.n_bytes) {
        llama_rwkv_ms_fail("keys 'delta_mem.tensor_count', 'total_numel' and 'total_bytes' are %u, %llu and %llu, "
                           "but the file has %zu, %llu and %llu",
                m.n_tensors, (unsigned long long) m.n_numel, (unsigned long long) m.n_bytes,
                ids.size(), (unsigned long long) n_numel, (unsigned long long) n_bytes);
    }

    if (!m.entries.is_array()) {
        llama_rwkv_ms_fail("tensor_manifest_json must be a list");
    }
    for (const auto & entry : m.entries) {
        const std::string name = llama_rwkv_ms_json_str("tensor_manifest_json: an entry", entry, "name");
        if (!ids.count(name) || !manifest.emplace(name, &entry).second) {
            llama_rwkv_ms_fail("tensor_manifest_json: %s is there twice or is no tensor of the file", llama_rwkv_ms_quote(name).c_str());
        }
    }
}

void rwkv_ms_reader::check(const std::string & name, const std::string & source, const rwkv_ms_spec & spec) const {
    const int64_t id   = ids.at(name);
    const size_t  size = gguf_get_tensor_size(gguf, id);

    // [8, 1] and [8] are one shape to the file, the manifest tells them apart
    rwkv_ms_shape want = spec.shape;
    while (want.size() > 1 && want.front() == 1) {
        want.erase(want.begin());
    }
    if (shape(id) != want) {
        llama_rwkv_ms_fail("tensor '%s' has shape %s, must be %s", name.c_str(), rwkv_ms_shape_text(shape(id)).c_str(),
                rwkv_ms_shape_text(spec.shape).c_str());
    }

    const auto it = manifest.find(name);
    if (it == manifest.end()) {
        llama_rwkv_ms_fail("tensor '%s' is missing in tensor_manifest_json", name.c_str());
    }
    const std::string what  = "tensor_manifest_json: " + name;
    const json &      entry = *it->second;

    if (llama_rwkv_ms_json_str(what, entry, "source_name") != source) {
        llama_rwkv_ms_fail("%s: source_name must be '%s'", what.c_str(), source.c_str());
    }
    if (!entry.contains("shape") || llama_rwkv_ms_json_ints(what + ": shape", entry.at("shape"), 0, INT64_MAX) != spec.shape) {
        llama_rwkv_ms_fail("%s: shape must be %s", what.c_str(), rwkv_ms_shape_text(spec.shape).c_str());
    }

    std::string type = llama_rwkv_ms_json_str(what, entry, "gguf_type");
    type             = type.substr(type.rfind('.') + 1); // an enum's name may stand before it
    for (char & c : type) {
        c = (char) tolower((unsigned char) c);
    }
    if (type != ggml_type_name(gguf_get_tensor_type(gguf, id))) {
        llama_rwkv_ms_fail("%s: gguf_type is %s, but the tensor is %s", what.c_str(), llama_rwkv_ms_quote(type).c_str(),
                ggml_type_name(gguf_get_tensor_type(gguf, id)));
    }
    if ((size_t) llama_rwkv_ms_json_int(what, entry, "bytes", 0, INT64_MAX) != size ||
            (size_t) llama_rwkv_ms_json_int(what, entry, "numel", 0, INT64_MAX) != size / ggml_type_size(gguf_get_tensor_type(gguf, id))) {
        llama_rwkv_ms_fail("%s: bytes and numel do not match the tensor's %zu bytes", what.c_str(), size);
    }

    const std::string sha = llama_rwkv_ms_sha256::hex(llama_rwkv_ms_sha256::hash(data(id), size));
    if (llama_rwkv_ms_json_str(what, entry, "sha256_raw") != sha) {
        llama_rwkv_ms_fail("tensor '%s' has SHA-256 %s, which is not the manifest's sha256_raw: the file is damaged, copy it again",
                name.c_str(), sha.c_str());
    }
}

llama_rwkv_ms_tensor rwkv_ms_reader::load(const std::string & name, const rwkv_ms_spec & spec) const {
    const int64_t   id   = ids.at(name);
    const ggml_type type = gguf_get_tensor_type(gguf, id);
    const size_t    n    = gguf_get_tensor_size(gguf, id) / ggml_type_size(type);
    const uint8_t * src  = data(id);

    llama_rwkv_ms_tensor res;
    res.shape = spec.shape;
    res.data.resize(n);

    // memcpy: the data of the file has no alignment in memory
    for (size_t i = 0; i < n; ++i) {
        if (type == GGML_TYPE_F32) {
            memcpy(&res.data[i], src + 4 * i, 4);
        } else {
            uint16_t x;
            memcpy(&x, src + 2 * i, 2);
            res.data[i] = type == GGML_TYPE_F16 ? ggml_fp16_to_fp32(x) : ggml_bf16_to_fp32(ggml_bf16_t{ x });
        }
        if (!std::isfinite(res.data[i])) {
            llama_rwkv_ms_fail("tensor '%s' has a NaN or Inf at element %zu: export a sound checkpoint", name.c_str(), i);
        }
    }
    return res;
}

void llama_rwkv_ms_sidecar_read_tensors(
        const gguf_context *           gguf,
        const std::vector<uint8_t> &   file,
        const llama_rwkv_ms_manifest & manifest,
        llama_rwkv_ms_sidecar &        res) {
    rwkv_ms_reader reader = { file, gguf, {}, {} };
    reader.index(manifest);

    const std::string first = "blk." + std::to_string(res.layers.front().il) + ".";

    res.n_embd         = reader.n_cols(first + "mem_v");
    res.hparams.n_lora = (uint32_t) reader.n_cols(first + "rwkv.w1");

    for (auto & layer : res.layers) {
        if (layer.width[3] != res.n_embd) {
            llama_rwkv_ms_fail("per_layer_attention_json: o_out of layer %d is %lld, but its hidden size is %lld (tensor '%smem_v')",
                    layer.il, (long long) layer.width[3], (long long) res.n_embd, first.c_str());
        }
        for (const auto & [name, spec] : rwkv_ms_layer_specs(res, layer)) {
            const std::string full = "blk." + std::to_string(layer.il) + "." + name;
            if (!reader.ids.count(full)) {
                if (spec.required) {
                    llama_rwkv_ms_fail("tensor '%s' is missing: export the sidecar again", full.c_str());
                }
                continue;
            }
            reader.check(full, rwkv_ms_source_name(layer.il, name), spec);

            llama_rwkv_ms_tensor tensor = reader.load(full, spec);
            if (spec.used) {
                layer.tensors.emplace(name, std::move(tensor));
            }
            reader.ids.erase(full);
        }
    }
    if (!reader.ids.empty()) {
        llama_rwkv_ms_fail("tensor %s is not one that its config uses: it may change the maths, so the sidecar needs a newer build",
                llama_rwkv_ms_quote(reader.ids.begin()->first).c_str());
    }
}
