-- fence.lua: fences an incarnation in a bucket. It works if Redis is out of memory too:
-- DEL is not refused then, and neither is the write after it.
--
-- KEYS[1] fence
-- ARGV[1] life of the fence (ms)  ARGV[2] '1': nothing of the incarnation is left
--
-- A fence says 'dead' until nothing is left, and 'gone' from then on.

local value = ARGV[2] == '1' and 'gone' or 'dead'
if redis.pcall('GET', KEYS[1]) == 'gone' then
  value = 'gone'
end
redis.call('DEL', KEYS[1])
redis.call('SET', KEYS[1], value, 'PX', ARGV[1])
return 1
