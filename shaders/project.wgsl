// uses: quad, norm_scale, project_op, columns
// Projection: y[r, first + n] = (y if add) + sum_k norm(x)[r, k] * weight[n, k] + bias[first + n].
//
// By columns: decoding, at most 16 rows of x at once. One subgroup serves a quad of weight rows.
@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(num_subgroups) num_subgroups: u32,
    @builtin(subgroup_size) lanes: u32,
    @builtin(subgroup_invocation_id) lane: u32,
) {
    linear(group, subgroup, num_subgroups, lane, lanes);
}
