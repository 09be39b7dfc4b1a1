-- forget.lua: removes the connections of a dead incarnation from its index, and deletes
-- their metadata unless another server has registered the connection since.
--
-- KEYS[1] owned index, then connection-meta of each
-- ARGV[1] incarnation, then the connection ids

for i = 2, #ARGV do
  if redis.call('HGET', KEYS[i], 'o') == ARGV[1] then
    redis.call('DEL', KEYS[i])
  end
  redis.call('SREM', KEYS[1], 'c ' .. ARGV[i])
end
return #ARGV - 1
