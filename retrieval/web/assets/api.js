// Calls of the server's JSON; a token that was typed in goes with each of them.

export const hasToken = () => Boolean(sessionStorage.getItem("token"));
export const useToken = (token) => sessionStorage.setItem("token", token);

export async function get(path, signal) {
  const headers = {};
  const token = sessionStorage.getItem("token");
  if (token) headers.Authorization = `Bearer ${token}`;
  const response = await fetch(path, { headers, signal });
  const body = await response.json().catch(() => ({ error: `HTTP ${response.status}` }));
  if (!response.ok) throw Object.assign(new Error(body.error || `HTTP ${response.status}`), { status: response.status });
  return body;
}

export const describe = (release) => get(release ? `api/describe?${new URLSearchParams({ release })}` : "api/describe");

// One search: what differs from the state comes in `other`, e.g. another release.
export function search(state, filter, other, signal) {
  const { q, type, k, exact, legs, release, sure } = { ...state, ...other };
  const wanted = new URLSearchParams({ q, type, k });
  if (exact) wanted.set("exact", "1");
  if (legs) wanted.set("legs", legs);
  if (release) wanted.set("release", release);
  if (sure) wanted.set("min_probability", sure);
  if (filter) wanted.set("filter", filter);
  return get(`api/search?${wanted}`, signal);
}
