-- meta.lua: compare-and-set of a versioned value (metadata of a connection or of a
-- room).
--
-- KEYS[1] the hash
-- ARGV[1] version that it must have ('0': none yet)  ARGV[2] the new value
-- ARGV[3] '1': fail if it has no owner
-- ARGV[4] prefix of server channels, ARGV[5] connection id (connections only), to notify the owner
-- ARGV[6] tag of this write: a write with the same tag is a retry of one that has run
-- ARGV[7] the new version is also higher than this: Redis may have gone back behind the owner's
-- Reply: {'+', new version, owner}, {'x', version, value, owner} if the version differs, {'0'} without an owner

local h = redis.call('HMGET', KEYS[1], 'v', 'd', 'o', 'w')
if ARGV[3] == '1' and not h[3] then
  return { '0' }
end
if h[4] == ARGV[6] then
  return { '+', h[1], h[3] or '' }
end
if (h[1] or '0') ~= ARGV[1] then
  return { 'x', h[1] or '0', h[2] or '', h[3] or '' }
end
local version = string.format('%.0f', math.max(tonumber(ARGV[1]), tonumber(ARGV[7])) + 1)
redis.call('HSET', KEYS[1], 'v', version, 'd', ARGV[2], 'w', ARGV[6])
if ARGV[3] == '1' then
  redis.call('PUBLISH', ARGV[4] .. h[3], 'meta ' .. ARGV[5] .. ' ' .. version .. ' ' .. ARGV[2])
end
return { '+', version, h[3] or '' }
