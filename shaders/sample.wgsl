// Choice of a token: suppression, temperature, top-k, top-p, min-p, one draw; bit for bit what
// `src/sampler.rs` does.
//
// One workgroup chooses for one row. A logit becomes a key, an integer that grows with it; a weight is
// `2^-((best - logit) inverse / 2^26)` with 31 bits after the point, by one subtraction, one
// multiplication and integers. Sums of weights are exact, so that no order of summation can change a
// token. Every question is then the same: where, in some order, does a running sum pass a number? The
// k-th largest key, and the key at which top-p cuts, are found digit by digit, by bins of 8 bits; the
// id that is drawn by runs of ids. With a top-k of at most 256, the k-th largest of the best keys of 256
// parts bounds what may stay, which is then listed in workgroup memory, by id.
//
// Logits are read as bits: a driver may flush floats that are too small to be normal.

struct Params {
    n_rows: u32,
    vocab: u32,
    limit: u32,
    top_k: u32,
    inverse: f32,
    may_go: u32,
    least: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> logits: array<u32>;          // [n_rows, vocab], bits of f32
@group(0) @binding(2) var<storage, read> suppressed: array<u32>;      // [vocab / 32], bits
@group(0) @binding(3) var<storage, read> draws: array<vec2<u32>>;     // [n_rows]
@group(0) @binding(4) var<storage, read_write> ids: array<u32>;       // [n_rows]

// Bins of a digit, runs of ids, and parts that a bound is found from; at most LANES.
const BINS = 256u;
// No token, and the key of what is not finite.
const NONE = 0xffffffffu;
// Entries of the list.
const LIST = 512u;

// Numbers of 64 bits are pairs, the lower half first.

// Sums by bin, in three limbs of 11 bits each, so that 2^21 weights do not overflow.
var<workgroup> bins: array<atomic<u32>, 3u * BINS>;
var<workgroup> sums: array<vec2<u32>, BINS>;
var<workgroup> bests: array<vec2<u32>, LANES>;
var<workgroup> sixteens: array<vec2<u32>, 16>;
var<workgroup> list_key: array<u32, LIST>;
var<workgroup> list_id: array<u32, LIST>;
var<workgroup> n_listed: atomic<u32>;
var<workgroup> bound: u32;

var<private> lane: u32;
var<private> first_of_subgroup: bool;
var<private> row: u32;
var<private> best: u32;
// Entries: those of the list, or all ids below the limit.
var<private> listed: bool;
var<private> count: u32;
// What may stay: keys above `cut_key`, and those equal to it from `cut_id` on.
var<private> cut_key: u32;
var<private> cut_id: u32;
var<private> least: u32;

fn high(a: u32, b: u32) -> u32 {
    let low = (a & 0xffffu) * (b & 0xffffu);
    let one = (a >> 16u) * (b & 0xffffu) + (low >> 16u);
    let two = (a & 0xffffu) * (b >> 16u) + (one & 0xffffu);
    return (a >> 16u) * (b >> 16u) + (one >> 16u) + (two >> 16u);
}

fn times(a: u32, b: u32) -> vec2<u32> {
    return vec2(a * b, high(a, b));
}

fn plus(a: vec2<u32>, b: vec2<u32>) -> vec2<u32> {
    let low = a.x + b.x;
    return vec2(low, a.y + b.y + u32(low < a.x));
}

fn minus(a: vec2<u32>, b: vec2<u32>) -> vec2<u32> {
    return vec2(a.x - b.x, a.y - b.y - u32(a.x < b.x));
}

fn exceeds(a: vec2<u32>, b: vec2<u32>) -> bool {
    return a.y > b.y || (a.y == b.y && a.x > b.x);
}

fn key_of(bits: u32) -> u32 {
    let magnitude = bits & 0x7fffffffu;
    let is_bad = magnitude > 0x7f800000u || bits == 0x7f800000u;
    let tiny = select(select(bits | 0x80000000u, ~bits, bits > 0x7fffffffu), 0x80000000u, magnitude < 0x00800000u);
    return select(select(tiny, 0u, bits == 0xff800000u), NONE, is_bad);
}

// What a key's logit counts as in a distance: at most 2^60, so that no distance is infinite.
fn value_of(key: u32) -> f32 {
    let is_negative = key < 0x80000000u;
    let magnitude = min(select(key, ~key, is_negative) & 0x7fffffffu, 0x5d800000u);
    return bitcast<f32>(magnitude | select(0u, 0x80000000u, is_negative));
}

fn weight_of(key: u32) -> u32 {
    let x = (value_of(best) - value_of(key)) * params.inverse;
    let halvings = u32(min(x, 2147483520.0));
    let f = halvings << 6u;
    var sum = 0x00078809u;
    sum = 0x0054a612u - high(sum, f);
    sum = 0x0274f388u - high(sum, f);
    sum = 0x0e353290u - high(sum, f);
    sum = 0x3d7f7506u - high(sum, f);
    sum = 0xb17217dfu - high(sum, f);
    let weight = (0x80000000u - high(sum, f) / 2u) >> (halvings >> 26u);
    return select(weight, 0u, x >= 2147483648.0);
}

// Key of a token; 0 if it is suppressed or behind the limit.
fn key_at(id: u32) -> u32 {
    // Loaded in any case, so that loads need not wait for each other.
    let at = min(id, params.limit - 1u);
    let key = key_of(logits[row * params.vocab + at]);
    let is_out = (suppressed[at >> 5u] >> (at & 31u) & 1u) == 1u && key != NONE;
    return select(key, 0u, is_out || id >= params.limit);
}

// Keys of four entries, one workgroup apart; 0 behind the last.
fn keys_at(entry: u32) -> vec4<u32> {
    let at = vec4(entry) + vec4(0u, LANES, 2u * LANES, 3u * LANES);
    if listed {
        let clamped = min(at, vec4(LIST - 1u));
        let keys = vec4(list_key[clamped.x], list_key[clamped.y], list_key[clamped.z], list_key[clamped.w]);
        return select(keys, vec4(0u), at >= vec4(count));
    }
    return vec4(key_at(at.x), key_at(at.y), key_at(at.z), key_at(at.w));
}

fn id_at(entry: u32) -> u32 {
    if listed {
        return list_id[min(entry, LIST - 1u)];
    }
    return entry;
}

fn limbs(amount: u32) -> vec3<u32> {
    return vec3(amount & 2047u, amount >> 11u & 2047u, amount >> 22u);
}

fn put(bin: u32, limbs: vec3<u32>) {
    if limbs.x > 0u {
        atomicAdd(&bins[bin], limbs.x);
    }
    if limbs.y > 0u {
        atomicAdd(&bins[BINS + bin], limbs.y);
    }
    if limbs.z > 0u {
        atomicAdd(&bins[2u * BINS + bin], limbs.z);
    }
}

// Makes `sum` this lane's of the sums to search, if there is one.
fn settle(sum: vec2<u32>) {
    workgroupBarrier();
    if lane < BINS {
        sums[lane] = sum;
    }
    workgroupBarrier();
    if lane < 16u {
        var all = vec2(0u);
        for (var i = 0u; i < 16u; i++) {
            all = plus(all, sums[lane * 16u + i]);
        }
        sixteens[lane] = all;
    }
    workgroupBarrier();
}

// Makes the bins the sums to search, and empties them.
fn settle_bins() {
    workgroupBarrier();
    var sum = vec2(0u);
    if lane < BINS {
        let x = atomicExchange(&bins[lane], 0u);
        let y = atomicExchange(&bins[BINS + lane], 0u);
        let z = atomicExchange(&bins[2u * BINS + lane], 0u);
        sum = plus(plus(vec2(x, 0u), vec2(y << 11u, y >> 21u)), vec2(z << 22u, z >> 10u));
    }
    settle(sum);
}

fn total() -> vec2<u32> {
    var all = vec2(0u);
    for (var i = 0u; i < 16u; i++) {
        all = plus(all, sixteens[i]);
    }
    return all;
}

struct Found {
    // Where the running sum passes the target; BINS if nowhere.
    at: u32,
    // The sum before it.
    before: vec2<u32>,
}

fn search(start: vec2<u32>, goal: vec2<u32>) -> Found {
    var found = Found(0u, start);
    for (var i = 0u; i < 16u; i++) {
        let next = plus(found.before, sixteens[i]);
        if exceeds(next, goal) {
            break;
        }
        found = Found(found.at + 16u, next);
    }
    if found.at < BINS {
        for (var i = 0u; i < 16u; i++) {
            let next = plus(found.before, sums[found.at]);
            if exceeds(next, goal) {
                break;
            }
            found = Found(found.at + 1u, next);
        }
    }
    return found;
}

// Puts an entry into the bin of a digit, if the digits above it are those found: by falling keys and
// their number, or by rising keys and their weight.
fn put_digit(key: u32, by_weight: bool, shift: u32, known: u32, found: u32) {
    let order = select(~key, key, by_weight);
    if key < cut_key || ((order ^ found) & known) != 0u {
        return;
    }
    var amount = 1u;
    if by_weight {
        amount = weight_of(key);
    }
    put(order >> shift & 255u, limbs(amount));
}

// The key at which the running sum passes the target, complemented if keys fall; `at` is NONE if nowhere.
fn descend(by_weight: bool, goal: vec2<u32>) -> Found {
    var found = Found(0u, vec2(0u));
    var known = 0u;
    var is_there = true;
    for (var round = 0u; round < 4u; round++) {
        let shift = 24u - 8u * round;
        for (var i = lane; i < count; i += 4u * LANES) {
            let keys = keys_at(i);
            put_digit(keys.x, by_weight, shift, known, found.at);
            put_digit(keys.y, by_weight, shift, known, found.at);
            put_digit(keys.z, by_weight, shift, known, found.at);
            put_digit(keys.w, by_weight, shift, known, found.at);
        }
        settle_bins();
        let digit = search(found.before, goal);
        is_there = is_there && digit.at < BINS;
        found = Found(found.at | (digit.at & 255u) << shift, digit.before);
        known |= 255u << shift;
    }
    if !is_there {
        found.at = NONE;
    }
    return found;
}

// What an entry adds to a sum: its weight if it stays, or 1 if its key is the one of the cut.
fn amount_of(key: u32, id: u32, ties: bool) -> u32 {
    if key < cut_key || (key == cut_key && id < cut_id) {
        return 0u;
    }
    if ties {
        return u32(key == cut_key);
    }
    let weight = weight_of(key);
    return select(weight, 0u, weight < least);
}

// Entries of a run; all entries are at most BINS runs.
fn run_length() -> u32 {
    let least = 4u * LANES;
    return (count + least * BINS - 1u) / (least * BINS) * least;
}

// Makes the sums of runs of entries the sums to search.
fn settle_runs(ties: bool) {
    let run = run_length();
    for (var first = 0u; first < count; first += 4u * LANES) {
        let i = first + lane;
        let keys = keys_at(i);
        let all = limbs(amount_of(keys.x, id_at(i), ties))
            + limbs(amount_of(keys.y, id_at(i + LANES), ties))
            + limbs(amount_of(keys.z, id_at(i + 2u * LANES), ties))
            + limbs(amount_of(keys.w, id_at(i + 3u * LANES), ties));
        let sum = vec3(subgroupAdd(all.x), subgroupAdd(all.y), subgroupAdd(all.z));
        if first_of_subgroup {
            put(first / run, sum);
        }
    }
    settle_bins();
}

// The id at which the running sum passes the goal, after `settle_runs`.
fn find(ties: bool, goal: vec2<u32>) -> u32 {
    let share = run_length() / BINS;
    let run = search(vec2(0u), goal);
    var first = run.at * run_length() + lane * share;
    var sum = vec2(0u);
    for (var i = first; i < min(first + share, count) && lane < BINS; i++) {
        sum = plus(sum, vec2(amount_of(keys_at(i).x, id_at(i), ties), 0u));
    }
    settle(sum);
    let part = search(run.before, goal);
    first = run.at * run_length() + part.at * share;
    sum = part.before;
    for (var i = first; i < min(first + share, count); i++) {
        sum = plus(sum, vec2(amount_of(keys_at(i).x, id_at(i), ties), 0u));
        if exceeds(sum, goal) {
            return id_at(i);
        }
    }
    return NONE;
}

// The larger of two keys, with the lower id of equal ones.
fn better(a: vec2<u32>, b: vec2<u32>) -> vec2<u32> {
    return select(a, b, b.x > a.x || (b.x == a.x && b.y < a.y));
}

// The best key and its lowest id; whether anything is not finite shows in the key.
fn find_best() -> vec2<u32> {
    var mine = vec2(0u, NONE);
    for (var i = lane; i < count; i += 4u * LANES) {
        let keys = keys_at(i);
        mine = select(mine, vec2(keys.x, i), keys.x > mine.x);
        mine = select(mine, vec2(keys.y, i + LANES), keys.y > mine.x);
        mine = select(mine, vec2(keys.z, i + 2u * LANES), keys.z > mine.x);
        mine = select(mine, vec2(keys.w, i + 3u * LANES), keys.w > mine.x);
    }
    bests[lane] = mine;
    workgroupBarrier();
    if lane < BINS {
        for (var i = lane + BINS; i < LANES; i += BINS) {
            mine = better(mine, bests[i]);
        }
        sums[lane] = mine;
    }
    workgroupBarrier();
    var all = vec2(0u, NONE);
    var rank = 0u;
    for (var i = 0u; i < BINS; i++) {
        let other = sums[i];
        all = better(all, other);
        rank += u32(other.x > mine.x || (other.x == mine.x && i < lane));
    }
    // As many keys as top-k asks for are at least this large.
    if lane < BINS && rank + 1u == params.top_k {
        bound = mine.x;
    }
    workgroupBarrier();
    return all;
}

// Lists what is not below the bound, if it is not too many, by ascending id.
fn list() {
    for (var i = lane; i < count; i += 4u * LANES) {
        let keys = keys_at(i);
        list_if(keys.x, i);
        list_if(keys.y, i + LANES);
        list_if(keys.z, i + 2u * LANES);
        list_if(keys.w, i + 3u * LANES);
    }
    workgroupBarrier();
    let n = atomicLoad(&n_listed);
    let fits = n <= LIST;
    let in_list = min(n, LIST);
    let mine = vec2(lane, lane + LANES);
    let at = min(mine, vec2(LIST - 1u));
    let keys = vec2(list_key[at.x], list_key[at.y]);
    let tokens = vec2(list_id[at.x], list_id[at.y]);
    var rank = vec2(0u);
    for (var i = 0u; i < in_list; i++) {
        rank += vec2<u32>(vec2(list_id[i]) < tokens);
    }
    workgroupBarrier();
    if mine.x < in_list {
        list_key[rank.x] = keys.x;
        list_id[rank.x] = tokens.x;
    }
    if mine.y < in_list {
        list_key[rank.y] = keys.y;
        list_id[rank.y] = tokens.y;
    }
    workgroupBarrier();
    listed = fits;
    count = select(count, n, fits);
}

fn list_if(key: u32, id: u32) {
    if key < max(bound, 1u) {
        return;
    }
    let at = atomicAdd(&n_listed, 1u);
    if at < LIST {
        list_key[at] = key;
        list_id[at] = id;
    }
}

// Cuts what top-p takes: the least likely tokens while their sum stays within its share.
fn cut_top_p() {
    settle_runs(false);
    let all = total();
    let share = plus(times(all.y, params.may_go), vec2(high(all.x, params.may_go), 0u));
    let cut = descend(true, share);
    cut_key = cut.at;
    // Of the tokens that tie there, those of the lowest ids go too, as many as the share allows.
    let rest = minus(share, cut.before);
    let weight = weight_of(cut_key);
    var ties = 0u;
    for (var bit = 1u << 23u; bit > 0u; bit >>= 1u) {
        ties |= select(bit, 0u, exceeds(times(ties | bit, weight), rest));
    }
    // The same in all lanes.
    if ties > 0u {
        settle_runs(true);
        cut_id = find(true, vec2(ties, 0u));
    }
}

// A 64-bit fraction of a number.
fn part_of(whole: vec2<u32>, fraction: vec2<u32>) -> vec2<u32> {
    let one = plus(times(fraction.y, whole.x), vec2(high(fraction.x, whole.x), 0u));
    let two = plus(times(fraction.x, whole.y), vec2(one.x, 0u));
    return plus(times(fraction.y, whole.y), plus(vec2(one.y, 0u), vec2(two.y, 0u)));
}

@compute @workgroup_size(LANES)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_id) local: vec3<u32>,
    @builtin(subgroup_invocation_id) invocation: u32,
) {
    lane = local.x;
    first_of_subgroup = invocation == 0u;
    row = group.x;
    listed = false;
    count = params.limit;
    for (var i = lane; i < 3u * BINS; i += LANES) {
        atomicStore(&bins[i], 0u);
    }
    if lane == 0u {
        atomicStore(&n_listed, 0u);
    }
    let chosen = find_best();
    best = chosen.x;
    var id = chosen.y;
    if params.inverse > 0.0 {
        cut_key = 1u;
        cut_id = 0u;
        least = 0u;
        if params.top_k > 0u {
            if params.top_k <= BINS {
                list();
                cut_key = max(bound, 1u);
            }
            let kth = descend(false, vec2(params.top_k - 1u, 0u));
            cut_key = select(~kth.at, 1u, kth.at == NONE);
        }
        if params.may_go > 0u {
            cut_top_p();
        }
        least = params.least;
        settle_runs(false);
        id = find(false, part_of(total(), draws[row]));
    }
    if lane == 0u {
        ids[row] = select(id, NONE, best == 0u || best == NONE);
    }
}
