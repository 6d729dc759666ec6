#include "server-json-depth.h"

#include "server-common.h"

#include <algorithm>
#include <string_view>

static const int SERVER_JSON_MAX_DEPTH = 256;

// of the brackets outside of strings: what a parser would go down to, if it got that far
static int server_json_depth(std::string_view text) {
    int  res       = 0;
    int  depth     = 0;
    bool in_string = false;

    for (size_t i = 0; i < text.size(); ++i) {
        switch (text[i]) {
            case '"':
                in_string = !in_string;
                break;
            case '\\':
                i += in_string;
                break;
            case '[':
            case '{':
                depth += !in_string;
                res = std::max(res, depth);
                break;
            case ']':
            case '}':
                depth -= !in_string;
                break;
        }
    }
    return res;
}

server_http_res_ptr server_json_depth_limit(const server_http_context::handler_t & handler, const server_http_req & req) {
    const int depth = server_json_depth(req.body);
    if (depth <= SERVER_JSON_MAX_DEPTH) {
        return handler(req);
    }
    const std::string what = "the body is nested " + std::to_string(depth) + " deep, at most " + std::to_string(SERVER_JSON_MAX_DEPTH) + " are read";

    auto res    = std::make_unique<server_http_res>();
    res->status = 400;
    res->data   = safe_json_to_str(json{ { "error", format_error_response(what, ERROR_TYPE_INVALID_REQUEST) } });
    return res;
}
