-- leave.lua: leaves.

-- ended reports whether an entry without a record, which Redis has held, was ended by
-- this batch or by another server: then its end was published, and it was counted and
-- removed from the index. Otherwise its record is lost, and mirrors still list it.
local function ended(name)
  return owned[name] == false or
    placed and not overcounted(mine) and call('SMISMEMBER', keys[2], name)[1] == 0
end

-- leave ends an entry. known is '1' if Redis has acknowledged the entry. wanted: its
-- connection has ended without asking for that, so its place may be kept.
local function leave(mark, conn, entry, known, connKey, stateKey, wanted)
  if waits == members then
    return 'k'
  end
  local v, out = read(members, conn)
  if not v and out ~= '0' then
    return out
  end
  local by = mine
  if v and find(v, entry .. mine, 1, true) ~= 1 then
    local id
    id, by = match(v, '^(%S+)( %S+ )')
    if not id then
      return '! ' .. ODD
    end
    if id ~= entry then
      v, out = nil, 'x'
    end
  end
  local name = indexed(conn, entry)
  if not v then
    if out == '0' and known == '1' and not stand(batch) then
      if users ~= nil and not usersKey then
        return again()
      end
      if not ended(name) then
        farewell(conn, entry, mine, mark, sub(mark, -1))
      end
    end
    owned[name] = false
    if out == '0' and connKey then
      call('DEL', connKey, stateKey)
    end
    return out
  end
  local from = #entry + #by + 1
  if sub(v, from, from + 3) == '0 0 ' then
    connKey = nil -- neither TTL nor state
  elseif not connKey then
    return again()
  end
  local err = stand(batch)
  if err then
    return '! ' .. err
  end
  local user, grace, stop, till, cause = '', '0', nil, nil, nil
  if users ~= nil or wanted then
    local _, s, _, _, _, _, _, _, _, _, _, _, tail = find(v, REST, from)
    if not s then
      return '! ' .. ODD
    end
    stop = s
    user, grace, _, _, till, cause = person(v, stop, tail)
    if lacksKeys(user ~= '' or wanted and grace ~= '0', user) then
      return again()
    end
    if by == KEPT and call('HGET', members, conn) ~= v then
      return '0' -- its user has others, as a recount found
    end
  end
  owned[name] = false
  if by == KEPT and (wanted or cause == sub(mark, -1)) then
    detail = ' ' .. till
    return 1 -- it has run before, or another server has found it
  end
  if by ~= KEPT and stop then
    till = keptUntil(conn, user, grace, wanted)
    if till and handOver(conn, entry, by, v, stop, till, sub(mark, -1), mark, connKey, stateKey) then
      detail = ' ' .. till
      return 1
    end
  end
  remove(conn, entry, by, connKey, stateKey, mark, sub(mark, -1), user)
  return 0
end
