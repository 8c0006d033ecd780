// uses: quad, norm_scale, rope, qkv_op, tiles
// Queries, keys and values of norm(x): projection, bias, rotation of the keys, write to the cache.
//
// By tiles: the many rows of a prefill. One workgroup serves 16 quads of weight rows and 32 rows of x.
@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    linear(group, local);
}
