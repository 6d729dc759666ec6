// Sidecar files, sound and hostile: what is loaded, and that everything else is refused with a line that says why.

#include "sidecar-file.h"

static int n_failed = 0;

static void check(bool ok, const std::string & what) {
    if (!ok) {
        printf("FAIL %s\n", what.c_str());
        n_failed++;
    }
}

static fs::path path_test;

// "" if it loads
static std::string load_error(const fs::path & path) {
    try {
        llama_adapter_mem_sidecar_load(path.string().c_str());
    } catch (const std::runtime_error & e) {
        return e.what();
    }
    return "";
}

static void expect_ok(const std::string & name, test_sidecar sidecar) {
    sidecar.write(path_test);
    const std::string err = load_error(path_test);
    check(err.empty(), name + ": " + err);
}

// one line: the file's name, the reason as in docs/sidecar.md, the given text
static void expect_refused(test_sidecar sidecar, const std::string & reason, const std::string & text) {
    sidecar.write(path_test);
    const std::string err   = load_error(path_test);
    const std::string start = "sidecar '" + path_test.string() + "': [" + reason + "] ";
    check(err.rfind(start, 0) == 0 && err.find(text) != std::string::npos, "expected [" + reason + "] '" + text + "', got '" + err + "'");
    check(err.find('\n') == std::string::npos, "more than one line: '" + err + "'");
}

static void expect_refused(const std::function<void(test_sidecar &)> & edit, const std::string & reason, const std::string & text, int format = 1) {
    test_sidecar sidecar(format);
    edit(sidecar);
    expect_refused(sidecar, reason, text);
}

//
// tests
//

static void test_sound() {
    test_sidecar v1(1);
    v1.write(path_test);
    const auto   sidecar = llama_adapter_mem_sidecar_load(path_test.string().c_str());
    const auto & hparams = sidecar->hparams;

    check(hparams.rank == 8 && hparams.n_head == 1 && hparams.n_state == 4 && hparams.n_chunk == 48, "sizes");
    check(hparams.n_lora == L && hparams.n_gate == D && hparams.n_rank_total() == D && sidecar->n_embd == H, "derived sizes");
    check(hparams.semantics == 1 && hparams.update_mode == 0 && hparams.couple_lambda, "variant");
    check(hparams.alpha == 16.0f && hparams.erase_gate == 1.0f, "scales");
    check(sidecar->head[0] && !sidecar->head[1] && !sidecar->head[2] && sidecar->head[3], "heads");
    check(sidecar->layers.size() == 2 && sidecar->layers[1].il == 5, "layers");
    check(sidecar->layers[0].is_swa && !sidecar->layers[1].is_swa, "attention kinds");
    check(sidecar->base_sha256 == std::string(63, 'a') + "0", "the base's hash is in lower case");
    check(sidecar->sha256.size() == 64 && sidecar->fingerprint.size() == 64 && sidecar->sha256 != sidecar->fingerprint, "hashes");

    const auto & tensors = sidecar->layers[1].tensors;
    check(!tensors.count("mem_q") && !tensors.count("delta_k") && !tensors.count("rwkv.ln_x.bias"), "unused tensors are not kept");
    check(tensors.at("delta_q").shape == std::vector<int64_t>({ 32, D }), "torch shape");
    check(tensors.at("delta_q").data[1] == -0.875f && tensors.at("delta_q").data.back() == 0.5f, "values");

    expect_ok("v2", test_sidecar(2));

    test_sidecar v2(2);
    v2.set_semantics(1);
    expect_ok("v2 with semantics 1", v2);

    for (const ggml_type type : { GGML_TYPE_F16, GGML_TYPE_F32 }) {
        test_sidecar other;
        other.tensors["blk.0.mem_v"] = make_tensor({ D, H }, type);
        other.write(path_test);
        check(llama_adapter_mem_sidecar_load(path_test.string().c_str())->layers[0].tensors.at("mem_v").data[1] == -0.875f, "values of other types");
    }

    test_sidecar lambda;
    lambda.config["couple_lambda"]     = false;
    lambda.config["state_update_mode"] = "no_lambda";
    lambda.config["rankwise_gates"]    = false;
    for (const char * blk : { "blk.0.", "blk.5." }) {
        for (const char * name : { "beta", "lambda" }) {
            lambda.tensors[std::string(blk) + name]        = make_tensor({ 1, H });
            lambda.tensors[std::string(blk) + name + "_b"] = make_tensor({ 1 });
        }
        lambda.tensors.erase(std::string(blk) + "mem_q");
        lambda.tensors.erase(std::string(blk) + "delta_k");
    }
    expect_ok("lambda, gates per head, no unused tensors", lambda);

    test_sidecar inert;
    inert.config["beta_bias_init"]           = 7;
    inert.config["delta_scale_granularity"]  = "head";
    inert.config["rwkv_ms_read_temperature"] = 1; // an integer where a number is wanted
    expect_ok("inert values", inert);
}

static void test_files() {
    check(load_error(path_test.parent_path() / "none.gguf").find("[unreadable] cannot be opened") != std::string::npos, "missing file");
    check(load_error(path_test.parent_path()).find("[unreadable] is not a file") != std::string::npos, "a directory");

    expect_refused([](test_sidecar & s) { s.edit_file = [](std::vector<uint8_t> & f) { f.clear(); }; }, "not-gguf", "is not a GGUF file");
    expect_refused([](test_sidecar & s) { s.edit_file = [](std::vector<uint8_t> & f) { f[0] = 'X'; }; }, "not-gguf", "is not a GGUF file");
    expect_refused([](test_sidecar & s) { s.edit_file = [](std::vector<uint8_t> & f) { f[4] = 2; }; }, "gguf-version", "of version 2");
    expect_refused([](test_sidecar & s) { s.edit_file = [](std::vector<uint8_t> & f) { f.resize(f.size() + 64); }; }, "trailing-bytes", "64 bytes follow the last tensor");
    expect_refused([](test_sidecar & s) { s.edit_file = [](std::vector<uint8_t> & f) { memset(&f[8], 0x7f, 8); }; }, "gguf-count", "at most 65536");
    expect_refused([](test_sidecar & s) { s.arch = "gemma4"; }, "not-a-sidecar", "general.architecture' is 'gemma4'");
    expect_refused([](test_sidecar & s) { s.tensors.clear(); s.alignment = 64; }, "alignment", "general.alignment' must be a u32 of 32");

    // two tensors of one name
    expect_refused([](test_sidecar & s) {
        s.edit_file = [](std::vector<uint8_t> & f) {
            const std::string from = "blk.0.rwkv.x_r";
            const auto        it   = std::find_end(f.begin(), f.end(), from.begin(), from.end());
            it[from.size() - 1]    = 'w';
        };
    },
            "tensor-duplicate", "tensor 'blk.0.rwkv.x_w' is there twice");

    // a cut anywhere
    test_sidecar good;
    good.write(path_test);
    const size_t size = fs::file_size(path_test);
    for (size_t n = 0; n < size; n += 1 + size / 97) {
        expect_refused([&](test_sidecar & s) { s.edit_file = [&](std::vector<uint8_t> & f) { f.resize(n); }; }, n < 4 ? "not-gguf" : "truncated", "");
    }
    expect_refused([](test_sidecar & s) { s.edit_file = [](std::vector<uint8_t> & f) { f.resize(f.size() - 32); }; }, "truncated", "tensor 'blk.5.");

    // a damaged byte anywhere in the tensors
    for (size_t n = 32; n < 6500; n += 501) {
        expect_refused([&](test_sidecar & s) { s.edit_file = [&](std::vector<uint8_t> & f) { f[f.size() - n] ^= 0x10; }; }, "tensor-hash", "tensor 'blk.");
    }
}

static void test_keys() {
    expect_refused([](test_sidecar & s) { s.u32s["format_version"] = 3; }, "format-version", "format_version' is 3");
    expect_refused([](test_sidecar & s) { s.strs["schema"] = "x"; }, "schema", "schema' is 'x'");
    expect_refused([](test_sidecar & s) { s.strs["schema"].back() = '2'; }, "schema", "schema");
    expect_refused([](test_sidecar & s) { s.set_semantics(2); }, "semantics-version", "rwkv_ms_semantics_version' is 2, in format 1");
    expect_refused([](test_sidecar & s) { s.set_semantics(3); }, "semantics-version", "rwkv_ms_semantics_version' is 3", 2);
    expect_refused([](test_sidecar & s) { s.u32s.erase("rwkv_ms_semantics_version"); }, "key-missing", "rwkv_ms_semantics_version' is missing", 2);
    expect_refused([](test_sidecar & s) { s.u32s["rwkv_ms_semantics_version"] = 1; }, "disagree", "config_json: rwkv_ms_semantics_version is 2", 2);
    expect_refused([](test_sidecar & s) { s.config.erase("rwkv_ms_semantics_version"); }, "disagree", "config_json: rwkv_ms_semantics_version is 1", 2);
    expect_refused([](test_sidecar & s) { s.strs["rwkv_ms_state_dtype"] = "bf16"; }, "unsupported", "rwkv_ms_state_dtype' is 'bf16'", 2);
    expect_refused([](test_sidecar & s) { s.strs["base_gguf_sha256"] = "abc"; }, "key-value", "base_gguf_sha256");
    expect_refused([](test_sidecar & s) { s.strs.erase("base_gguf_sha256"); }, "key-missing", "base_gguf_sha256' is missing");
    expect_refused([](test_sidecar & s) { s.strs["memory_backend"] = "delta"; }, "unsupported", "memory_backend' is 'delta'");
    expect_refused([](test_sidecar & s) { s.strs["memory_readout_mode"] = "projected_kv"; }, "unsupported", "memory_readout_mode' is 'projected_kv'");
    expect_refused([](test_sidecar & s) { s.strs["rwkv_ms_boundary_mode"] = "learned"; }, "unsupported", "rwkv_ms_boundary_mode' is 'learned'");
    expect_refused([](test_sidecar & s) { s.strs["tensor_name_format"] = "full"; }, "unsupported", "tensor_name_format' is 'full'");
    expect_refused([](test_sidecar & s) { s.strs["novelty"] = "x"; }, "key-unknown", "unknown key 'delta_mem.novelty'");
    expect_refused([](test_sidecar & s) { s.u32s.erase("rank"); s.strs["rank"] = "8"; }, "key-type", "rank' has type str, must be u32");
    expect_refused([](test_sidecar & s) { s.strs.erase("status"); s.u32s["status"] = 1; }, "key-type", "status' has type u32");
    expect_refused([](test_sidecar & s) { s.u32s["rank"] = 4; }, "disagree", "rank' is 4, but config_json has 8");
    expect_refused([](test_sidecar & s) { s.alpha = 8.0f; }, "disagree", "alpha' is 8");
    expect_refused([](test_sidecar & s) { s.alpha = NAN; }, "key-value", "alpha");
    expect_refused([](test_sidecar & s) { s.u32s["tensor_count"] = 3; }, "disagree", "tensor_count");
    expect_refused([](test_sidecar & s) { s.u64s["total_numel"] = 3; }, "disagree", "total_numel");
    expect_refused([](test_sidecar & s) { s.u64s["total_bytes"] = 3; }, "disagree", "total_bytes");
    expect_refused([](test_sidecar & s) {
        s.edit_gguf = [](gguf_context * gguf) {
            const uint32_t values[2] = { 8, 8 };
            gguf_set_arr_data(gguf, "delta_mem.rank", GGUF_TYPE_UINT32, values, 2);
        };
    },
            "key-type", "rank' has type arr");
    expect_refused([](test_sidecar & s) {
        s.u32s["rwkv_ms_chunk_size"] = s.config["rwkv_ms_chunk_size"] = (1 << 22) + 1;
    },
            "config-value", "at most 16777216");
    expect_refused([](test_sidecar & s) { s.u32s["rwkv_ms_chunk_size"] = s.config["rwkv_ms_chunk_size"] = 0; }, "config-value", "rwkv_ms_chunk_size is '0'");
    expect_refused([](test_sidecar & s) { s.u32s["num_state_heads"] = s.config["num_state_heads"] = 65; }, "config-value", "num_state_heads is '65'");
    expect_refused([](test_sidecar & s) { s.u32s["num_state_heads"] = s.config["num_state_heads"] = 2; }, "tensor-shape", "has shape [8, 16], must be [16, 16]");
}

static void test_config() {
    struct bad_value {
        const char * key;
        json         value;
        const char * reason = "config-unsupported";
    };

    const bad_value bad_values[] = {
        { "memory_fusion_mode", "gate" },
        { "memory_fusion_placement", "residual" },
        { "memory_write_granularity", "message" },
        { "rwkv_ms_write_mode", "overwrite" },
        { "memory_readout_mode", "projected_kv" },
        { "rwkv_ms_boundary_mode", "learned" },
        { "memory_backend", "delta" },
        { "trainable_delta_scale", true },
        { "delta_o_rmsnorm", true },
        { "num_memory_partitions", 2 },
        { "num_memory_partitions", 1.0 },
        { "num_memory_partitions", true },
        { "rwkv_ms_anchor_interval", 4 },
        { "rwkv_ms_read_top_k", 1 },
        { "rwkv_ms_read_temperature", 0.5 },
        { "rwkv_ms_outer_ffn_layers", { 1 } },
        { "latent_memory_layers", { 1 } },
        { "memory_reader_layers", { 1 } },
        { "rwkv_ms_mask_empty_slots", true },
        { "rwkv_ms_write_address_gain", 0.1 },
        { "target_modules", { "mlp" } },
        { "state_update_mode", "other" },
        { "couple_lambda", 1, "config-value" },
        { "rankwise_gates", "yes", "config-value" },
        { "rwkv_ms_erase_gate", "1", "config-value" },
        { "rwkv_ms_erase_gate", 1e300, "config-value" },
        { "rank", 8.0, "config-value" },
        { "rank", -8, "config-value" },
        { "rank", 1e30, "config-value" },
        { "rwkv_ms_num_states", 0, "config-value" },
        { "beta_bias_init", "x", "config-value" },
        { "rwkv_ms_detach_read_scores", 0, "config-value" },
        { "target_layers", { 5, 0 }, "key-value" },
        { "target_layers", { 0, 0 }, "key-value" },
        { "target_layers", { -1, 5 }, "key-value" },
        { "target_layers", json::array(), "key-value" },
        { "delta_heads", { "q", "q" }, "key-value" },
        { "delta_heads", { "z" }, "key-value" },
        { "delta_heads", json::array(), "key-value" },
        { "delta_heads", { "qo" }, "key-value" },
        { "novelty", 0, "config-unknown" },
    };
    for (const auto & bad : bad_values) {
        expect_refused([&](test_sidecar & s) { s.config[bad.key] = bad.value; }, bad.reason, bad.key);
    }

    for (const char * key : { "rank", "couple_lambda", "state_update_mode", "rankwise_gates", "rwkv_ms_erase_gate", "target_layers", "delta_heads" }) {
        expect_refused([&](test_sidecar & s) {
            s.config.erase(key);
            s.jsons["target_layers_json"] = { 0, 5 };
            s.jsons["delta_heads_json"]   = { "q", "o" };
        },
                "config-missing", key);
    }

    expect_refused([](test_sidecar & s) { s.jsons["target_layers_json"] = { 0 }; }, "disagree", "target_layers");
    expect_refused([](test_sidecar & s) { s.jsons["delta_heads_json"] = { "q" }; }, "disagree", "delta_heads");

    const auto config_text = [](const std::string & text) {
        return [text](test_sidecar & s) { s.strs["config_json"] = text; };
    };
    expect_refused(config_text("{"), "json-invalid", "config_json' is not valid JSON");
    expect_refused(config_text("[]"), "json-type", "config_json' must be a JSON object");
    expect_refused(config_text("{\"alpha\": NaN}"), "json-invalid", "config_json' is not valid JSON");
    expect_refused(config_text("{\"rank\": 8, \"rank\": 4}"), "json-duplicate", "the member 'rank' twice");
    expect_refused(config_text(std::string(100000, '[')), "json-depth", "nested deeper");
    expect_refused(config_text("{\"a\xff\": 1}"), "not-utf8", "key 'delta_mem.config_json'");
    expect_refused(config_text("\xef\xbb\xbf{}"), "json-invalid", "config_json' is not valid JSON");
    expect_refused(config_text("{\"rank\": \"\\ud800\"}"), "json-invalid", "config_json' is not valid JSON");
    expect_refused(config_text("{\"rank\": 1e999}"), "json-invalid", "config_json' is not valid JSON");
    expect_refused(config_text(std::string((16 << 20) + 1, ' ')), "json-size", "config_json' has 16777217 bytes");
    expect_refused(config_text("{\"evil\\nline\": 1}"), "config-unknown", "unknown member 'evil?line'");
    expect_refused(config_text("{\"" + std::string(5000, 'x') + "\": 1}"), "config-unknown", "...'");

    const auto attention = [](int i, const char * key, const json & value) {
        return [=](test_sidecar & s) { s.jsons["per_layer_attention_json"][i][key] = value; };
    };
    expect_refused(attention(0, "layer", 1), "attention", "layer 0");
    expect_refused(attention(1, "attention_kind", "linear"), "attention", "layer 5: attention_kind is '\"linear\"'");
    expect_refused(attention(1, "q_out", 0), "attention", "q_out must be positive");
    expect_refused(attention(1, "q_out", "32"), "attention", "q_out");
    expect_refused(attention(1, "o_out", 32), "attention", "o_out of layer 5 is 32");
    expect_refused(attention(1, "active_delta_heads", { "q" }), "attention", "active_delta_heads");
    expect_refused([](test_sidecar & s) { s.jsons["per_layer_attention_json"].erase(0); }, "disagree", "one for each of the 2 target layers");
}

static void test_tensors() {
    const auto replace = [](const char * name, const test_tensor & tensor) {
        return [=](test_sidecar & s) { s.tensors[name] = tensor; };
    };

    // every needed tensor, missing
    for (const auto & [name, tensor] : test_sidecar().tensors) {
        const bool needed = name.find("mem_q") == std::string::npos && name.find("mem_k") == std::string::npos &&
                name.find("delta_k") == std::string::npos && name.find("delta_v") == std::string::npos;
        test_sidecar sidecar;
        sidecar.tensors.erase(name);
        if (needed) {
            expect_refused(sidecar, "tensor-missing", "tensor '" + name + "' is missing");
        } else {
            expect_ok(name + " is not needed", sidecar);
        }
        // and every tensor with a wrong shape
        if (name != "blk.0.mem_v" && name != "blk.0.rwkv.w1") {
            auto shape = tensor.shape;
            shape[0] += 1;
            expect_refused(replace(name.c_str(), make_tensor(shape)), "tensor-shape", "tensor '" + name + "' has shape");
        }
    }

    expect_refused(replace("blk.0.rwkv.w1", make_tensor({ L, D })), "tensor-shape", "has shape");
    expect_refused(replace("blk.0.mem_v", make_tensor({ H, D })), "attention", "hidden size");
    expect_refused(replace("blk.0.beta", make_tensor({ H, D })), "tensor-shape", "tensor 'blk.0.beta' has shape [16, 8], must be [8, 16]");
    expect_refused(replace("blk.0.x", make_tensor({ D })), "tensor-unknown", "tensor 'blk.0.x'");
    expect_refused(replace("blk.1.mem_v", make_tensor({ D, H })), "tensor-unknown", "tensor 'blk.1.mem_v'");
    expect_refused(replace("blk.0.lambda", make_tensor({ D, H })), "tensor-unknown", "tensor 'blk.0.lambda'");
    expect_refused(replace("blk.0.rwkv.r_k", make_tensor({ D })), "tensor-unknown", "tensor 'blk.0.rwkv.r_k'");
    expect_refused(replace("blk.0.beta", make_tensor({ D, H }, GGML_TYPE_F64)), "tensor-type", "tensor 'blk.0.beta' has type 28");

    const float inf = std::numeric_limits<float>::infinity();
    for (const ggml_type type : { GGML_TYPE_BF16, GGML_TYPE_F16, GGML_TYPE_F32 }) {
        expect_refused(replace("blk.5.rwkv.key.weight", make_tensor({ D, D }, type, NAN)), "tensor-nonfinite", "tensor 'blk.5.rwkv.key.weight' has a NaN or Inf at element 63");
        expect_refused(replace("blk.5.rwkv.key.weight", make_tensor({ D, D }, type, -inf)), "tensor-nonfinite", "tensor 'blk.5.rwkv.key.weight' has a NaN or Inf at element 63");
    }

    const auto manifest = [](const char * key, const json & value) {
        return [=](test_sidecar & s) { s.edit_manifest = [=](json & m) { m[3][key] = value; }; };
    };
    expect_refused(manifest("name", "blk.9.x"), "manifest", "'blk.9.x' is there twice or is no tensor");
    expect_refused(manifest("source_name", "x"), "manifest", "source_name is '\"x\"'");
    expect_refused(manifest("shape", { 1, 2 }), "manifest", "shape is '[1,2]'");
    expect_refused(manifest("gguf_type", "F16"), "manifest", "gguf_type is '\"F16\"'");
    expect_refused(manifest("bytes", 1), "manifest", "numel and bytes");
    expect_refused(manifest("numel", 1), "manifest", "numel and bytes");
    expect_refused(manifest("sha256_raw", std::string(64, '0')), "tensor-hash", "not the manifest's sha256_raw");
    expect_refused([](test_sidecar & s) { s.edit_manifest = [](json & m) { m.erase(3); }; }, "manifest", "is missing in tensor_manifest_json");
    expect_refused([](test_sidecar & s) { s.edit_manifest = [](json & m) { m[4] = m[3]; }; }, "manifest", "is there twice");
    expect_refused([](test_sidecar & s) { s.edit_manifest = [](json & m) { m = 1; }; }, "json-type", "tensor_manifest_json' must be a JSON list");
}

static void test_base() {
    const fs::path base = path_test.parent_path() / "base.bin";
    std::ofstream(base, std::ios::binary) << "abc";

    const auto error = [&](const std::string & sha, const fs::path & path) -> std::string {
        test_sidecar s;
        s.strs["base_gguf_sha256"] = sha;
        s.write(path_test);
        const auto sidecar = llama_adapter_mem_sidecar_load(path_test.string().c_str());
        try {
            sidecar->base_hash_check(); // not started: nothing to check
            sidecar->base_hash_start(path.string().c_str());
            sidecar->base_hash_check();
        } catch (const std::runtime_error & e) {
            return e.what();
        }
        return "";
    };

    const std::string sha_abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"; // FIPS 180-2
    const std::string sha_bad = std::string(64, '0');

    check(error(sha_abc, base).empty(), "the bound base");
    const std::string err = error(sha_bad, base);
    check(err.find("[base-hash] ") != std::string::npos && err.find(sha_abc) != std::string::npos && err.find(sha_bad) != std::string::npos, "both hashes in '" + err + "'");
    check(error(sha_abc, path_test.parent_path() / "none.gguf").find("cannot be opened") != std::string::npos, "missing base");
}

int main() {
    const fs::path dir = fs::temp_directory_path() / ("test-adapter-mem-sidecar-" + std::to_string(std::hash<std::string>{}(fs::current_path().string())));
    fs::create_directories(dir);
    path_test = dir / "sidecar.gguf";

    // the refusals of gguf.h would drown the rest
    ggml_log_set([](ggml_log_level, const char *, void *) {}, nullptr);

    test_sound();
    test_files();
    test_keys();
    test_config();
    test_tensors();
    test_base();

    fs::remove_all(dir);

    printf(n_failed ? "%d checks failed\n" : "all tests passed\n", n_failed);
    return n_failed ? 1 : 0;
}
