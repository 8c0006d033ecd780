// uses: softmax_state
// Attention of up to 16 rows, with several query heads of one KV head each, to one split of keys.
//
// A block stores its keys at positions 0..len, so a query enters the block's frame by being rotated to
// its location there: the row's position minus the block's start in the row's view. The same integer is
// the causal bound (Rodionov et al. 2025, section 3.4). Here the key is turned instead, in registers: the
// product of a rotated query with a key is that of the query with the key rotated back, and a lane that
// holds a key needs only the angles of its block. So a new block costs one load of angles, no barrier and
// no copy of the queries, and 500 short blocks cost what one long block costs.
//
// A workgroup goes over its split in four rounds of 64 keys, with three barriers each.
// * Scores: a team of 64 lanes serves LANE_HEADS heads of a row. Eight lanes share a product: each has
//   slices of four channels and of the four that they are rotated with. The team's eight groups of eight
//   lanes take a stretch of 32 neighbouring keys of the split each, eight of them in a round: so a lane
//   meets as few blocks as can be. A quad of lanes adds up the products of four keys by shuffles.
// * Softmax: four lanes for each query; they keep its running maximum and sum.
// * Values: quads of lanes own eight channels for LANE_HEADS heads of a row, and each lane of a quad goes
//   over a fourth of the keys. At the end the four add up, by shuffles.
// K and V are read from memory once for all rows and heads: neighbouring lanes read neighbouring words,
// and what is used next is loaded before what is there is used.
//
// The order of every sum is fixed by the place of a key in the split: not by the rows of the pass, nor by
// where the split ends. A key behind the split's end, or one that the row does not see, weighs zero; tiles in
// front of the split that no row sees may be left out, and their places are then such keys.

struct Params {
    n_work: u32,
    n_heads: u32,
    n_kv_heads: u32,
    head_dim: u32,
    n_pairs: u32,
    n_rows: u32,
    rows_per_work: u32,
    scale: f32,
    window: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> tiles: array<vec4<u32>>;         // [n_tiles]: slot, first index, keys + 65536 start, block
@group(0) @binding(2) var<storage, read> work: array<vec4<u32>>;          // [n_work]: first tile, end, first pair, pairs
@group(0) @binding(3) var<storage, read> pair_rows: array<u32>;           // [n_pairs]
@group(0) @binding(4) var<storage, read> locations: array<i32>;           // [n_blocks, n_rows]
@group(0) @binding(5) var<storage, read> angles: array<vec4<f32>>;        // [n, PAIRS]: cos, sin
@group(0) @binding(6) var<storage, read> q: array<vec4<f32>>;             // [n_rows, n_heads, HEAD_DIM]
@group(0) @binding(7) var<storage, read> keys: array<Kv4>;                // [n_slots, n_kv_heads, HEAD_DIM]
@group(0) @binding(8) var<storage, read> values: array<Kv8>;              // [n_slots, n_kv_heads, HEAD_DIM]
@group(0) @binding(9) var<storage, read_write> partial: array<vec2<f32>>; // [n_pairs, n_heads, HEAD_DIM]
@group(0) @binding(10) var<storage, read_write> stats: array<vec2<f32>>;  // [n_pairs, n_heads]: max, sum

const SPLIT = 256u;                       // Most keys of a split: eight stretches.
const STRETCH = 32u;
const HEADS = PARTS * LANE_HEADS;         // Query heads of the workgroup for each row.
const QUERIES = TEAMS * LANE_HEADS;
const CHUNKS = HEAD_DIM / 8u;             // Eight channels, or four and the four they are rotated with.
const SLICES = (CHUNKS + 7u) / 8u;        // Chunks of one lane.
const TURNED = (PAIRS / 4u + 7u) / 8u;    // Those of them that have channels which rotate, the first ones.
const LINE = 17u;                         // 16 fours of scores; one more, or all lines begin in one bank.
const LANES = 64u * TEAMS / STEPS;

// Who owns which channels of the values: a quad has the chunks `chunk + i * WIDE` of the teams
// `crew + i * CREWS`.
const WIDE = min(CHUNKS, LANES / 4u);
const CREWS = LANES / 4u / WIDE;
const CHUNK_STEPS = (CHUNKS + WIDE - 1u) / WIDE;
const TEAM_STEPS = (TEAMS + CREWS - 1u) / CREWS;
const SUMS = CHUNK_STEPS * TEAM_STEPS * LANE_HEADS;

// Where each key of the split is: its slot, its block and its index there.
var<workgroup> slot_of: array<u32, SPLIT>;
var<workgroup> block_of: array<u32, SPLIT>;
var<workgroup> index_of: array<u32, SPLIT>;
// Of each query, two lines of a round's scores, a sum of four lanes in each; the first becomes the weights.
var<workgroup> scores: array<vec4<f32>, QUERIES * 2u * LINE>;
var<workgroup> fade: array<f32, QUERIES>;

@compute @workgroup_size(LANES)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_id) local: vec3<u32>,
) {
    let lane = local.x;
    let item = work[group.x];
    let gqa = params.n_heads / params.n_kv_heads;
    let first_head = group.y * gqa + group.z * HEADS;
    let n_heads = min(HEADS, gqa - group.z * HEADS);

    let last = tiles[item.y - 1u];
    let n_keys = (last.z >> 16u) + (last.z & 0xffffu);
    // The place of the first key that is there. Those before it stand for it, behind what any row sees.
    let front = tiles[item.x];
    let begin = front.z >> 16u;
    for (var i = lane; i < begin; i += LANES) {
        slot_of[i] = front.x;
        block_of[i] = front.w;
        index_of[i] = 0x7fffffffu;
    }
    for (var t = item.x + lane; t < item.y; t += LANES) {
        let tile = tiles[t];
        let start = tile.z >> 16u;
        for (var i = 0u; i < (tile.z & 0xffffu); i++) {
            slot_of[start + i] = tile.x + i;
            block_of[start + i] = tile.w;
            index_of[start + i] = tile.y + i;
        }
    }

    // The lane's part in the scores. Teams lie side by side, so that they read the same keys at once.
    let slice = lane % 8u;
    let team = lane / 8u % TEAMS;
    let pair = team / PARTS;
    let row = pair_rows[item.z + min(pair, item.w - 1u)];
    var q_lo: array<vec4<f32>, LANE_HEADS * SLICES>;
    var q_hi: array<vec4<f32>, LANE_HEADS * SLICES>;
    for (var h = 0u; h < LANE_HEADS; h++) {
        // A head behind the last is computed as the last and not stored.
        let head = first_head + min(team % PARTS * LANE_HEADS + h, n_heads - 1u);
        let at = (row * params.n_heads + head) * (2u * CHUNKS);
        for (var s = 0u; s < SLICES; s++) {
            // A slice behind the last is zero.
            let c = slice + s * 8u;
            let inside = vec4<bool>(c < CHUNKS);
            q_lo[h * SLICES + s] = select(vec4<f32>(), q[at + min(c, CHUNKS - 1u)], inside);
            q_hi[h * SLICES + s] = select(vec4<f32>(), q[at + CHUNKS + min(c, CHUNKS - 1u)], inside);
        }
    }
    var block = 0xffffffffu;
    var location = -1;
    var cos: array<vec4<f32>, TURNED>;
    var sin: array<vec4<f32>, TURNED>;

    // In the softmax: the state of query lane / 4.
    var best = NEG_LARGE;
    var total = 0.0;

    // In the values.
    let share = lane % 4u;
    let chunk = lane / 4u % WIDE;
    let crew = lane / 4u / WIDE;
    var acc: array<vec4<f32>, 2u * SUMS>;
    for (var i = 0u; i < 2u * SUMS; i++) {
        acc[i] = vec4<f32>();
    }

    workgroupBarrier();
    for (var first = 0u; first < min(STRETCH, n_keys); first += 8u) {
        if pair < item.w {
            for (var i = 0u; i < 2u * STEPS; i++) {
                let stretch = lane / (8u * TEAMS) + i / 2u * (8u / STEPS);
                let key = stretch * STRETCH + first + i % 2u * 4u;
                var sums: array<vec4<f32>, LANE_HEADS>;
                for (var h = 0u; h < LANE_HEADS; h++) {
                    sums[h] = vec4<f32>();
                }
                var seen = vec4<bool>();
                if key < n_keys && key + 4u > begin {
                    // The words of the next key are on their way while this one is served.
                    var next_lo: array<Kv4, SLICES>;
                    var next_hi: array<Kv4, SLICES>;
                    let at = (slot_of[key] * params.n_kv_heads + group.y) * (2u * CHUNKS);
                    for (var s = 0u; s < SLICES; s++) {
                        let c = min(slice + s * 8u, CHUNKS - 1u);
                        next_lo[s] = keys[at + c];
                        next_hi[s] = keys[at + CHUNKS + c];
                    }
                    for (var j = 0u; j < 4u; j++) {
                        let k_lo = next_lo;
                        let k_hi = next_hi;
                        if j < 3u {
                            let slot = slot_of[min(key + j + 1u, n_keys - 1u)];
                            let at = (slot * params.n_kv_heads + group.y) * (2u * CHUNKS);
                            for (var s = 0u; s < SLICES; s++) {
                                let c = min(slice + s * 8u, CHUNKS - 1u);
                                next_lo[s] = keys[at + c];
                                next_hi[s] = keys[at + CHUNKS + c];
                            }
                        }
                        let here = min(key + j, n_keys - 1u);
                        if block_of[here] != block {
                            block = block_of[here];
                            location = locations[block * params.n_rows + row];
                            let at = u32(max(location, 0)) * (PAIRS / 2u);
                            for (var s = 0u; s < TURNED; s++) {
                                let c = min(slice + s * 8u, PAIRS / 4u - 1u);
                                let a = angles[at + 2u * c];
                                let b = angles[at + 2u * c + 1u];
                                // What is behind the last pair stays as it is.
                                let turns = vec4<bool>(slice + s * 8u < PAIRS / 4u);
                                cos[s] = select(vec4<f32>(1.0), vec4<f32>(a.xz, b.xz), turns);
                                sin[s] = select(vec4<f32>(), vec4<f32>(a.yw, b.yw), turns);
                            }
                        }
                        let index = i32(index_of[here]);
                        seen[j] = key + j < n_keys && index <= location
                            && index > location - i32(params.window);
                        for (var s = 0u; s < SLICES; s++) {
                            let lo = kv4_load(k_lo[s]);
                            let hi = kv4_load(k_hi[s]);
                            var turned_lo = lo;
                            var turned_hi = hi;
                            if s < TURNED {
                                turned_lo = lo * cos[s] + hi * sin[s];
                                turned_hi = hi * cos[s] - lo * sin[s];
                            }
                            for (var h = 0u; h < LANE_HEADS; h++) {
                                sums[h][j] += dot(q_lo[h * SLICES + s], turned_lo)
                                    + dot(q_hi[h * SLICES + s], turned_hi);
                            }
                        }
                    }
                }
                // Lane j of a quad is left with the sum for key j. A hidden key's two sums are
                // NEG_LARGE and zero.
                let odd = vec2<bool>((slice & 1u) != 0u);
                let high = (slice & 2u) != 0u;
                let visible = seen[slice % 4u];
                let hidden = select(0.0, NEG_LARGE, slice < 4u);
                let to = (team * LANE_HEADS * 2u + slice / 4u) * LINE + stretch * 2u + i % 2u;
                for (var h = 0u; h < LANE_HEADS; h++) {
                    let s = sums[h];
                    let two = select(s.xz, s.yw, odd) + subgroupShuffleXor(select(s.yw, s.xz, odd), 1u);
                    let one = select(two.x, two.y, high) + subgroupShuffleXor(select(two.y, two.x, high), 2u);
                    scores[to + h * 2u * LINE][slice % 4u] = select(hidden, one * params.scale, visible);
                }
            }
        }
        workgroupBarrier();

        if lane / 4u < QUERIES {
            let at = lane / 4u * (2u * LINE) + lane % 4u;
            var most = vec4<f32>(best);
            for (var i = 0u; i < 16u; i += 4u) {
                let score = scores[at + i] + scores[at + LINE + i];
                scores[at + i] = score;
                most = max(most, score);
            }
            var next = max(max(most.x, most.y), max(most.z, most.w));
            next = max(next, subgroupShuffleXor(next, 1u));
            next = max(next, subgroupShuffleXor(next, 2u));
            var sums = vec4<f32>();
            for (var i = 0u; i < 16u; i += 4u) {
                let score = scores[at + i];
                // A hidden key weighs nothing, also where the row has seen none yet.
                let weight = select(exp(score - next), vec4<f32>(), score == vec4<f32>(NEG_LARGE));
                scores[at + i] = weight;
                sums += weight;
            }
            var sum = (sums.x + sums.y) + (sums.z + sums.w);
            sum += subgroupShuffleXor(sum, 1u);
            sum += subgroupShuffleXor(sum, 2u);
            let rescale = softmax_rescale(best, next);
            best = next;
            total = fma(total, rescale, sum);
            if lane % 4u == 0u {
                fade[lane / 4u] = rescale;
            }
        }
        workgroupBarrier();

        if crew / PARTS < item.w && crew < CREWS {
            for (var i = 0u; i < SUMS; i++) {
                let of_team = min(crew + i / LANE_HEADS % TEAM_STEPS * CREWS, TEAMS - 1u);
                let rescale = fade[of_team * LANE_HEADS + i % LANE_HEADS];
                acc[2u * i] *= rescale;
                acc[2u * i + 1u] *= rescale;
            }
            for (var four = share; four < 16u; four += 4u) {
                let key = four / 2u * STRETCH + first + four % 2u * 4u;
                if key >= n_keys {
                    break;
                }
                if key + 4u <= begin {
                    continue;
                }
                for (var c = 0u; c < CHUNK_STEPS; c++) {
                    let of_chunk = min(chunk + c * WIDE, CHUNKS - 1u);
                    var lo: array<vec4<f32>, 4>;
                    var hi: array<vec4<f32>, 4>;
                    for (var j = 0u; j < 4u; j++) {
                        let slot = slot_of[min(key + j, n_keys - 1u)];
                        let value = values[(slot * params.n_kv_heads + group.y) * CHUNKS + of_chunk];
                        lo[j] = kv8_lo(value);
                        hi[j] = kv8_hi(value);
                    }
                    for (var t = 0u; t < TEAM_STEPS; t++) {
                        let of_team = min(crew + t * CREWS, TEAMS - 1u);
                        for (var h = 0u; h < LANE_HEADS; h++) {
                            let weight = scores[(of_team * LANE_HEADS + h) * (2u * LINE) + four];
                            let i = (c * TEAM_STEPS + t) * LANE_HEADS + h;
                            for (var j = 0u; j < 4u; j++) {
                                acc[2u * i] = fma(vec4<f32>(weight[j]), lo[j], acc[2u * i]);
                                acc[2u * i + 1u] = fma(vec4<f32>(weight[j]), hi[j], acc[2u * i + 1u]);
                            }
                        }
                    }
                }
            }
        }
        // The next round overwrites the weights.
        workgroupBarrier();
    }

    // The four lanes of a quad add up what they have, and each is left with two of the eight channels.
    let odd = vec4<bool>((share & 1u) != 0u);
    let high = vec2<bool>((share & 2u) != 0u);
    for (var i = 0u; i < SUMS; i++) {
        let a = acc[2u * i];
        let b = acc[2u * i + 1u];
        let four = select(a, b, odd) + subgroupShuffleXor(select(b, a, odd), 1u);
        let two = select(four.xy, four.zw, high) + subgroupShuffleXor(select(four.zw, four.xy, high), 2u);
        let of_team = crew + i / LANE_HEADS % TEAM_STEPS * CREWS;
        let of_chunk = chunk + i / (LANE_HEADS * TEAM_STEPS) * WIDE;
        let of_pair = of_team / PARTS;
        let head = of_team % PARTS * LANE_HEADS + i % LANE_HEADS;
        if crew < CREWS && of_team < TEAMS && of_chunk < CHUNKS && of_pair < item.w && head < n_heads {
            let at = ((item.z + of_pair) * params.n_heads + first_head + head) * CHUNKS + of_chunk;
            partial[at * 4u + 2u * (share & 1u) + share / 2u] = two;
        }
    }
    let of_pair = lane / 4u / HEADS;
    let head = lane / 4u % HEADS;
    if lane % 4u == 0u && lane / 4u < QUERIES && of_pair < item.w && head < n_heads {
        stats[(item.z + of_pair) * params.n_heads + first_head + head] = vec2<f32>(best, total);
    }
}
