#include "llama-adapter-mem-config.h"
#include "llama-adapter-mem-sha256.h"
#include "llama-adapter-mem-sidecar.h"

#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstring>
#include <map>

using json = nlohmann::json;

using adapter_mem_shape = std::vector<int64_t>;

static std::string adapter_mem_shape_text(const adapter_mem_shape & shape) {
    std::string res = "[";
    for (size_t i = 0; i < shape.size(); ++i) {
        res += (i > 0 ? ", " : "") + std::to_string(shape[i]);
    }
    return res + "]";
}

// some writers of versions 1 and 2 leave leading dimensions of 1 out; where they are more, nothing is broadcast
static adapter_mem_shape adapter_mem_shape_plain(const adapter_mem_shape & shape) {
    const auto one = [](int64_t n) { return n == 1; };
    return shape.empty() ? shape : adapter_mem_shape(std::find_if_not(shape.begin(), shape.end() - 1, one), shape.end());
}

struct adapter_mem_spec {
    adapter_mem_shape shape;        // torch order, 0: not known, because the tensor that has it is missing
    bool              required;
    bool              used;         // by the maths
    bool              zero = false; // all values must be: of a delta head that is not active
};

// the core of an RWKV-MS
static void adapter_mem_core_specs(const llama_adapter_mem_hparams & hparams, std::map<std::string, adapter_mem_spec> & res) {
    const int64_t D = hparams.n_rank_total();
    const int64_t L = hparams.n_lora;

    res["rwkv.ln_x.bias"] = { { D }, true, false }; // is not applied
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
}

// the tensors of one layer by short name
static std::map<std::string, adapter_mem_spec> adapter_mem_layer_specs(const llama_adapter_mem_sidecar & sidecar, const llama_adapter_mem_sidecar::layer & layer) {
    const auto & hparams = sidecar.hparams;

    const int64_t H = sidecar.n_embd;
    const int64_t D = hparams.n_rank_total();
    const int64_t G = hparams.n_gate;

    const bool is_rwkv_ms = sidecar.kind == LLAMA_ADAPTER_MEM_KIND_RWKV_MS;

    std::map<std::string, adapter_mem_spec> res = {
        { "mem_q", { { D, H }, !is_rwkv_ms, !is_rwkv_ms } },
        { "mem_k", { { D, H }, !is_rwkv_ms, !is_rwkv_ms } },
        { "mem_v", { { D, H }, true, true } },
        { "beta", { { G, H }, true, true } },
        { "beta_b", { { G }, true, true } },
    };
    if (!hparams.couple_lambda) {
        res["lambda"]   = { { G, H }, true, true };
        res["lambda_b"] = { { G }, true, true };
    }
    if (is_rwkv_ms) {
        adapter_mem_core_specs(hparams, res);
    }
    if (hparams.n_scale > 0) {
        res["delta_scale"] = { { hparams.n_scale }, true, true };
    }
    if (hparams.o_norm && layer.width[3] > 0) {
        res["delta_o_norm"] = { { layer.width[3] }, sidecar.head[3], sidecar.head[3] };
    }
    for (int h = 0; h < 4; ++h) {
        if (layer.width[h] > 0) {
            const bool is_active = sidecar.head[h];

            res[std::string("delta_") + "qkvo"[h]] = { { layer.width[h], D }, is_active, is_active, !is_active && !is_rwkv_ms };
        }
    }
    return res;
}

// the name in the checkpoint, spec: {prefix}{L}.self_attn.{tail}
static std::string adapter_mem_source_name(const std::string & prefix, int32_t il, const std::string & name) {
    static const std::map<std::string, std::string> tails = {
        { "mem_q", "memory_q_proj" },
        { "mem_k", "memory_k_proj" },
        { "mem_v", "memory_v_proj" },
        { "beta", "beta_proj" },
        { "beta_b", "beta_bias" },
        { "lambda", "lambda_proj" },
        { "lambda_b", "lambda_bias" },
        { "delta_scale", "delta_scale_raw" },
        { "delta_o_norm", "delta_o_rmsnorm_weight" },
    };

    const auto        it   = tails.find(name);
    const std::string tail = it != tails.end() ? it->second : name.rfind("rwkv.", 0) == 0 ? "hrm_rwkv7_core." + name.substr(5)
                                                                                          : name + "_proj";

    return prefix + std::to_string(il) + ".self_attn." + tail;
}

struct adapter_mem_reader {
    std::map<std::string_view, const llama_adapter_mem_gguf::tensor *> tensors; // that no layer has taken yet
    std::map<std::string_view, const json *>                           manifest;

    const llama_adapter_mem_sidecar & sidecar;

    adapter_mem_reader(const llama_adapter_mem_gguf & gguf, const llama_adapter_mem_manifest & m, const llama_adapter_mem_sidecar & sidecar);

    // columns of a matrix, before it is known what they must be; 0 if it is missing
    int64_t n_cols(const std::string & name) const {
        const auto it = tensors.find(name);
        return it == tensors.end() ? 0 : it->second->shape.back();
    }

    // empty if it is not there and need not be
    llama_adapter_mem_tensor take(int32_t il, const std::string & name, const adapter_mem_spec & spec);
};

adapter_mem_reader::adapter_mem_reader(const llama_adapter_mem_gguf & gguf, const llama_adapter_mem_manifest & m, const llama_adapter_mem_sidecar & sidecar) : sidecar(sidecar) {
    uint64_t n_numel = 0;
    uint64_t n_bytes = 0;
    for (const auto & tensor : gguf.tensors) {
        tensors.emplace(tensor.name, &tensor);
        n_numel += tensor.numel;
        n_bytes += tensor.size;
    }

    const struct {
        const char * key;
        uint64_t     in_key;
        uint64_t     in_file;
    } counts[] = {
        { "tensor_count", m.n_tensors, tensors.size() },
        { "total_numel", m.n_numel, n_numel },
        { "total_bytes", m.n_bytes, n_bytes },
    };
    for (const auto & count : counts) {
        if (count.in_key != count.in_file) {
            llama_adapter_mem_fail("disagree", "key '%s.%s' is %llu, but the file has %llu", sidecar.format == 3 ? "memory_adapter" : "delta_mem", count.key,
                    (unsigned long long) count.in_key, (unsigned long long) count.in_file);
        }
    }

    for (const auto & entry : m.entries) {
        const json * name = llama_adapter_mem_json_find(entry, "name");
        if (!name || !name->is_string()) {
            llama_adapter_mem_fail("manifest", "tensor_manifest_json: an entry has no name: %s", llama_adapter_mem_json_text(entry).c_str());
        }
        const auto & text = name->get_ref<const std::string &>();
        if (!tensors.count(text) || !manifest.emplace(text, &entry).second) {
            llama_adapter_mem_fail("manifest", "tensor_manifest_json: %s is there twice or is no tensor of the file", llama_adapter_mem_quote(text).c_str());
        }
    }
}

static void adapter_mem_check_entry(const llama_adapter_mem_gguf::tensor & tensor, const json & entry, const std::string & source) {
    const std::string what = "tensor_manifest_json: " + std::string(tensor.name);

    const json source_name = entry.value("source_name", json());
    if (source_name != source) {
        llama_adapter_mem_fail("manifest", "%s: source_name is %s, must be '%s'", what.c_str(), llama_adapter_mem_json_text(source_name).c_str(), source.c_str());
    }

    const json        shape = entry.value("shape", json());
    adapter_mem_shape dims;
    for (const auto & n : shape.is_array() ? shape : json::array()) {
        dims.push_back(llama_adapter_mem_json_is_int(n, 1, INT64_MAX) ? n.get<int64_t>() : 0);
    }
    if (adapter_mem_shape_plain(dims) != adapter_mem_shape_plain(tensor.shape)) {
        llama_adapter_mem_fail("manifest", "%s: shape is %s, must be %s", what.c_str(), llama_adapter_mem_json_text(shape).c_str(),
                adapter_mem_shape_text(tensor.shape).c_str());
    }

    const json  type = entry.value("gguf_type", json());
    std::string name = type.is_string() ? type.get<std::string>() : "";
    name             = name.substr(name.rfind('.') + 1); // an enum's name may stand before it
    for (char & c : name) {
        c = (char) tolower((unsigned char) c);
    }
    if (name != ggml_type_name(tensor.type)) {
        llama_adapter_mem_fail("manifest", "%s: gguf_type is %s, but the tensor is %s", what.c_str(), llama_adapter_mem_json_text(type).c_str(),
                ggml_type_name(tensor.type));
    }

    const auto is = [&](const char * key, uint64_t want) {
        return llama_adapter_mem_json_is_int(entry.value(key, json()), (int64_t) want, (int64_t) want);
    };
    if (!is("numel", tensor.numel) || !is("bytes", tensor.size)) {
        llama_adapter_mem_fail("manifest", "%s: numel and bytes must be %llu and %zu", what.c_str(), (unsigned long long) tensor.numel, tensor.size);
    }

    const json sha_want = entry.value("sha256_raw", json());
    if (!sha_want.is_string()) {
        llama_adapter_mem_fail("manifest", "%s: sha256_raw is %s, must be a string", what.c_str(), llama_adapter_mem_json_text(sha_want).c_str());
    }
#ifndef FUZZING_BUILD_MODE_UNSAFE_FOR_PRODUCTION // a fuzzer finds no hash
    const std::string sha = llama_adapter_mem_sha256::hex(llama_adapter_mem_sha256::hash(tensor.data, tensor.size));
    if (sha_want != sha) {
        llama_adapter_mem_fail("tensor-hash", "tensor '%s' has SHA-256 %s, which is not the manifest's sha256_raw: the file is damaged, copy it again",
                std::string(tensor.name).c_str(), sha.c_str());
    }
#endif
}

static std::vector<float> adapter_mem_read_values(const llama_adapter_mem_gguf::tensor & tensor) {
    std::vector<float> res(tensor.numel);
    for (size_t i = 0; i < res.size(); ++i) {
        if (tensor.type == GGML_TYPE_F32) {
            memcpy(&res[i], tensor.data + 4 * i, 4);
        } else {
            uint16_t x;
            memcpy(&x, tensor.data + 2 * i, 2);
            res[i] = tensor.type == GGML_TYPE_F16 ? ggml_fp16_to_fp32(x) : ggml_bf16_to_fp32(ggml_bf16_t{ x });
        }
        if (!std::isfinite(res[i])) {
            llama_adapter_mem_fail("tensor-nonfinite", "tensor '%s' has a NaN or Inf at element %zu: export a sound checkpoint",
                    std::string(tensor.name).c_str(), i);
        }
    }
    return res;
}

llama_adapter_mem_tensor adapter_mem_reader::take(int32_t il, const std::string & name, const adapter_mem_spec & spec) {
    const std::string full = "blk." + std::to_string(il) + "." + name;

    const auto it = tensors.find(full);
    if (it == tensors.end()) {
        if (spec.required) {
            llama_adapter_mem_fail("tensor-missing", "tensor '%s' is missing: export the sidecar again", full.c_str());
        }
        return {};
    }
    const auto & tensor   = *it->second;
    const bool   is_known = std::find(spec.shape.begin(), spec.shape.end(), 0) == spec.shape.end();
    const bool   is_same  = sidecar.format == 3 ? tensor.shape == spec.shape : adapter_mem_shape_plain(tensor.shape) == adapter_mem_shape_plain(spec.shape);
    if (is_known && !is_same) {
        llama_adapter_mem_fail("tensor-shape", "tensor '%s' has shape %s, must be %s", full.c_str(), adapter_mem_shape_text(tensor.shape).c_str(),
                adapter_mem_shape_text(spec.shape).c_str());
    }

    const auto entry = manifest.find(full);
    if (entry == manifest.end()) {
        llama_adapter_mem_fail("manifest", "tensor '%s' is missing in tensor_manifest_json", full.c_str());
    }
    adapter_mem_check_entry(tensor, *entry->second, adapter_mem_source_name(sidecar.source_prefix, il, name));

    std::vector<float> values = adapter_mem_read_values(tensor);
    if (spec.zero && std::any_of(values.begin(), values.end(), [](float x) { return x != 0.0f; })) {
        llama_adapter_mem_fail("tensor-inactive", "tensor '%s' is not zero, but delta head %c is not active: make it active, or leave the tensor out", full.c_str(),
                name.back());
    }

    tensors.erase(it);
    return { spec.shape, std::move(values) };
}

void llama_adapter_mem_sidecar_read_tensors(const llama_adapter_mem_gguf & gguf, const llama_adapter_mem_manifest & manifest, llama_adapter_mem_sidecar & res) {
    adapter_mem_reader reader(gguf, manifest, res);

    const std::string first = "blk." + std::to_string(res.layers.front().il) + ".";

    res.n_embd         = reader.n_cols(first + "mem_v");
    res.hparams.n_lora = (uint32_t) reader.n_cols(first + "rwkv.w1");

    for (auto & layer : res.layers) {
        const int64_t o_out = layer.width[3];
        if (o_out != 0 && res.n_embd != 0 && o_out != res.n_embd) {
            llama_adapter_mem_fail("attention", "per_layer_attention_json: o_out of layer %d is %lld, but its hidden size is %lld (tensor '%smem_v')",
                    layer.il, (long long) o_out, (long long) res.n_embd, first.c_str());
        }
        for (const auto & [name, spec] : adapter_mem_layer_specs(res, layer)) {
            llama_adapter_mem_tensor tensor = reader.take(layer.il, name, spec);
            if (spec.used && !tensor.data.empty()) {
                layer.tensors.emplace(name, std::move(tensor));
            }
        }
    }
    if (!reader.tensors.empty()) {
        llama_adapter_mem_fail("tensor-unknown", "tensor %s is not one that its config uses: it may change the maths, so the sidecar needs a newer build",
                llama_adapter_mem_quote(reader.tensors.begin()->first).c_str());
    }
}
