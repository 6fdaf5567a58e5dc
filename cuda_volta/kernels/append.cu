// New keys and values into a cache, keys rotated on the way (spec: append_kv). A block has one row.
#include "rotary.cuh"

namespace volta {

struct NewRows {
    const u16* x;        // (rows, heads, head_dim)
    u16* cache;          // (pages, page, heads, head_dim)
    const float* scale;  // (heads,); null: 1
    i64 x_row, x_head, cache_page, cache_row, cache_head;
    i32 head_dim;
};

struct AppendParams {
    NewRows k, v;
    const i64* slots;  // outside the cache: skipped
    RotaryTable table;
    i32 num_slots, page, heads;
};

VOLTA_DEVICE void append_rows(const NewRows& n, i64 row, i64 page, i64 place, i32 heads, const RotaryTable& t,
                              Angles angles) {
    u16* const cache = n.cache + page * n.cache_page + place * n.cache_row;
    for (i32 i = static_cast<i32>(thread_index()); i < heads * n.head_dim; i += 256) {
        const i32 head = i / n.head_dim;
        const i32 d = i % n.head_dim;
        float x = rotated(n.x + row * n.x_row + head * n.x_head, d, t, angles);
        if (n.scale) x /= ldg(n.scale + head);
        stg(cache + head * n.cache_head + d, to_half(x));
    }
}

}  // namespace volta

using namespace volta;

VOLTA_KERNEL(append, 256, 4)(AppendParams p) {
    const i64 row = block_x();
    const i64 slot = ldg(p.slots + row);
    if (slot < 0 || slot >= p.num_slots) return;
    const i32 page = static_cast<i32>(slot) / p.page;
    const i32 place = static_cast<i32>(slot) % p.page;
    append_rows(p.k, row, page, place, p.heads, p.table, row_angles(p.table, row));
    append_rows(p.v, row, page, place, p.heads, p.table, {nullptr, nullptr});
}
