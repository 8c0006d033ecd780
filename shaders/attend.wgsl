// uses: softmax_state, rope
// Attention of up to ROWS rows, with HEADS query heads of one KV head each, to one split of keys.
//
// A block stores its keys at positions 0..len, so a query enters the block's frame by being rotated to
// its location there: the row's position minus the block's start in the row's view. The same integer is
// the causal bound (Rodionov et al. 2025, section 3.4). One workgroup goes over the tiles of its split:
// it rotates all queries when the block changes, scores the tile's keys, updates the running softmax and
// adds up the values, each lane for its own channels. K and V are read once for all queries.

struct Params {
    n_work: u32,
    n_heads: u32,
    n_kv_heads: u32,
    head_dim: u32,
    n_rows: u32,
    rows_per_work: u32,
    scale: f32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> tiles: array<vec4<u32>>;         // [n_tiles]: slot, first index, keys, block
@group(0) @binding(2) var<storage, read> work: array<vec4<u32>>;          // [n_work]: first tile, end, first pair, pairs
@group(0) @binding(3) var<storage, read> pair_rows: array<u32>;           // [n_pairs]
@group(0) @binding(4) var<storage, read> locations: array<i32>;           // [n_blocks, n_rows]
@group(0) @binding(5) var<storage, read> angles: array<vec2<f32>>;        // [n, HEAD_DIM / 2]: cos, sin
@group(0) @binding(6) var<storage, read> q: array<vec4<f32>>;             // [n_rows, n_heads, HEAD_DIM]
@group(0) @binding(7) var<storage, read> keys: array<Kv8>;                // [n_slots, n_kv_heads, HEAD_DIM]
@group(0) @binding(8) var<storage, read> values: array<Kv2>;              // [n_slots, n_kv_heads, HEAD_DIM]
@group(0) @binding(9) var<storage, read_write> partial: array<vec2<f32>>; // [n_pairs, n_heads, HEAD_DIM]
@group(0) @binding(10) var<storage, read_write> stats: array<vec2<f32>>;  // [n_pairs, n_heads]: max, sum

const TILE = 16u;
const QUERIES = ROWS * HEADS;
const WIDTH = HEAD_DIM / 4u;              // A head in vec4.
const HALF = HEAD_DIM / 8u;               // Half a head in vec4.
const WORDS = HEAD_DIM / 2u;              // A head in pairs of neighbouring channels.
const LANE_WORDS = (WORDS + 63u) / 64u;   // Pairs of channels of one lane.

var<workgroup> rotated: array<vec4<f32>, QUERIES * WIDTH>;
var<workgroup> weights: array<f32, QUERIES * TILE>;
var<workgroup> best: array<f32, QUERIES>;
var<workgroup> total: array<f32, QUERIES>;
var<workgroup> fade: array<f32, QUERIES>;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_id) local: vec3<u32>,
) {
    let lane = local.x;
    let item = work[group.x];
    let gqa = params.n_heads / params.n_kv_heads;
    let first_head = group.y * gqa + group.z * HEADS;
    let n_heads = min(HEADS, gqa - group.z * HEADS);
    let n_queries = item.w * HEADS;

    for (var i = lane; i < QUERIES; i += 64u) {
        best[i] = NEG_LARGE;
        total[i] = 0.0;
    }
    var acc: array<vec2<f32>, QUERIES * LANE_WORDS>;
    for (var i = 0u; i < QUERIES * LANE_WORDS; i++) {
        acc[i] = vec2<f32>();
    }

    var block = 0xffffffffu;
    for (var t = item.x; t < item.y; t++) {
        let tile = tiles[t];
        if tile.w != block {
            block = tile.w;
            for (var i = lane; i < n_queries * HALF; i += 64u) {
                let query = i / HALF;
                let part = i % HALF;
                let row = pair_rows[item.z + query / HEADS];
                let location = u32(max(locations[block * params.n_rows + row], 0));
                // A head behind the last is computed as the first and not stored.
                let head = first_head + select(0u, query % HEADS, query % HEADS < n_heads);
                let from_q = (row * params.n_heads + head) * WIDTH + part;
                let a = q[from_q];
                let b = q[from_q + HALF];
                let angle = location * WORDS + part * 4u;
                let r0 = rope_rotate(a.x, b.x, angles[angle]);
                let r1 = rope_rotate(a.y, b.y, angles[angle + 1u]);
                let r2 = rope_rotate(a.z, b.z, angles[angle + 2u]);
                let r3 = rope_rotate(a.w, b.w, angles[angle + 3u]);
                rotated[query * WIDTH + part] = vec4<f32>(r0.x, r1.x, r2.x, r3.x);
                rotated[query * WIDTH + part + HALF] = vec4<f32>(r0.y, r1.y, r2.y, r3.y);
            }
        }
        workgroupBarrier();

        for (var i = lane; i < n_queries * TILE; i += 64u) {
            let query = i / TILE;
            let key = i % TILE;
            let row = pair_rows[item.z + query / HEADS];
            var score = NEG_LARGE;
            if key < tile.z && i32(tile.y + key) <= locations[block * params.n_rows + row] {
                let at = ((tile.x + key) * params.n_kv_heads + group.y) * HALF;
                var sum = 0.0;
                for (var d = 0u; d < HALF; d++) {
                    let k = keys[at + d];
                    sum += dot(rotated[query * WIDTH + 2u * d], kv8_lo(k));
                    sum += dot(rotated[query * WIDTH + 2u * d + 1u], kv8_hi(k));
                }
                score = sum * params.scale;
            }
            weights[i] = score;
        }
        workgroupBarrier();

        for (var query = lane; query < n_queries; query += 64u) {
            let old = best[query];
            var new_best = old;
            for (var key = 0u; key < tile.z; key++) {
                new_best = max(new_best, weights[query * TILE + key]);
            }
            let rescale = softmax_rescale(old, new_best);
            var sum = total[query] * rescale;
            for (var key = 0u; key < tile.z; key++) {
                let score = weights[query * TILE + key];
                // A masked key weighs nothing, also where the row has seen none yet.
                let weight = select(exp(score - new_best), 0.0, score == NEG_LARGE);
                weights[query * TILE + key] = weight;
                sum += weight;
            }
            best[query] = new_best;
            total[query] = sum;
            fade[query] = rescale;
        }
        workgroupBarrier();

        for (var w = 0u; w < LANE_WORDS; w++) {
            let word = lane + w * 64u;
            if word < WORDS {
                for (var query = 0u; query < n_queries; query++) {
                    acc[query * LANE_WORDS + w] *= fade[query];
                }
                for (var key = 0u; key < tile.z; key++) {
                    let at = ((tile.x + key) * params.n_kv_heads + group.y) * WORDS + word;
                    let value = kv2_load(values[at]);
                    for (var query = 0u; query < n_queries; query++) {
                        let weight = vec2<f32>(weights[query * TILE + key]);
                        let i = query * LANE_WORDS + w;
                        acc[i] = fma(weight, value, acc[i]);
                    }
                }
            }
        }
        // The next tile overwrites the weights only behind its first barrier.
    }

    for (var query = 0u; query < n_queries; query++) {
        if query % HEADS < n_heads {
            let at = (item.z + query / HEADS) * params.n_heads + first_head + query % HEADS;
            for (var w = 0u; w < LANE_WORDS; w++) {
                let word = lane + w * 64u;
                if word < WORDS {
                    partial[at * WORDS + word] = acc[query * LANE_WORDS + w];
                }
            }
            if lane == 0u {
                stats[at] = vec2<f32>(best[query], total[query]);
            }
        }
    }
}
