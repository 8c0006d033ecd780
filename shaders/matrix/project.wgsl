// uses: quad, norm_scale, project_op, matrix
// Projection: y[r, first + n] = (y if add) + sum_k norm(x)[r, k] * weight[n, k] + bias[first + n].
//
// By cooperative matrices: the many rows of a prefill. One workgroup serves 64 weight rows and 64 rows of x.
@compute @workgroup_size(128)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
    @builtin(subgroup_id) subgroup: u32,
) {
    linear(group, local, subgroup);
}
